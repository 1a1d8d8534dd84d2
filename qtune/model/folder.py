"""Checks of a model folder that read headers only, made before any weight is loaded.

Pickled weights (.bin, .pt) can run code when they are opened, so they are named and refused, never
read.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qtune.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_folder(path: Path, *, weights: bool = True) -> None:
    """UserError unless `path` holds a config, a tokenizer and whole safetensors weights.

    Without `weights` nobody asks for those: a plan can be made from the config alone.
    """
    if not (path / "config.json").is_file():
        raise UserError(_why_no_config(path))
    read_json(path / "config.json")
    if weights:
        _check_weights(path)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{path} holds no tokenizer (one of {', '.join(_TOKENIZERS)}); copy the tokenizer "
            "files of the model into it"
        )


def _check_weights(path: Path) -> None:
    if (path / _SINGLE).is_file():
        tensor_names(path / _SINGLE)
    elif (path / _INDEX).is_file():
        _check_shards(path)
    else:
        raise UserError(_why_no_weights(path))


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file; UserError: it is cut off or damaged. No weight is read."""
    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is cut off or damaged ({error}); copy or download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError: it is damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; copy or download it again")
    return value


def _check_shards(path: Path) -> None:
    index = path / _INDEX
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index} has no weight_map; copy or download it again")
    promised: dict[str, set[str]] = {}
    for tensor, file in files.items():
        promised.setdefault(str(file), set()).add(tensor)
    for file, tensors in sorted(promised.items()):
        shard = path / file
        if not shard.is_file():
            raise UserError(f"{shard} is missing, but {_INDEX} names it; copy or download it again")
        absent = sorted(tensors - tensor_names(shard))
        if absent:
            raise UserError(
                f"{shard} lacks {absent[0]} and {len(absent) - 1} other tensors that {_INDEX} "
                "places in it; copy both again"
            )


def _why_no_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path} is an adapter, not a model: name the model it was trained on"
    found = sorted(path.glob("*.gguf"))
    if found:
        return f"{path} has no config.json; to use its GGUF file write {found[0]}"
    inner = sorted(path.glob("*/config.json"))
    hint = f"; did you mean {inner[0].parent}?" if inner else ""
    return f"{path} is not a model folder: it has no config.json{hint}"


def _why_no_weights(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        return (
            f"{path} has its weights only as pickles ({', '.join(pickles[:3])}), which can run "
            "code when opened and are never loaded. Convert them once where you trust them: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    found = f"; found {', '.join(others[:3])}, which transformers does not load" if others else ""
    return f"{path} holds no weights: neither {_SINGLE} nor {_INDEX}{found}"


def is_quantized(folder: Path) -> bool:
    """Whether the weights of a model folder are codes, so that there are no 16-bit ones."""
    return "quantization_config" in read_json(folder / "config.json")
