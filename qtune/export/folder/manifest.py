"""qtune.json: what a folder is and which base, adapter and template it came from.

An adapter belongs to the exact weights that it was trained on, so they are named by a hash. Bases
of up to 16 GB are hashed whole; of larger ones the headers of the weight files and their sizes,
which tells models but not fine-tunes of one model apart. The entry `of` says which.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtune.export.folder import template
from qtune.export.folder.companions import generation_config, write_json
from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import weight_files
from qtune.model.lora import QuantLoraLinear

NAME = template.NAME
WHOLE_BYTES = 16_000_000_000
_PACKAGES = ("qtune", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def write(folder: Path, trained: Trained, form: dict[str, Any]) -> None:
    """Write qtune.json; `form` says what kind of export the folder is."""
    recipe, tokenizer = trained.recipe, trained.tokenizer
    stops = generation_config(trained.base_folder, tokenizer)["eos_token_id"]
    value = form | {
        "base": {"model": recipe.model, "revision": recipe.revision}
        | base_hash(trained.base_folder),
        "trained_on": {"format": recipe.quant.format, "group_size": recipe.quant.group_size},
        "adapter_sha256": adapter_hash(trained.model),
        "stop_ids": stops if isinstance(stops, list) else [stops],
        "versions": versions(),
    }
    write_json(folder / NAME, value | template.facts(tokenizer))


def write_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the template, and a qtune.json that says which it is: what a run's adapter has."""
    template.write_text(folder, tokenizer)
    write_json(folder / NAME, template.facts(tokenizer))


def base_hash(folder: Path, whole_bytes: int = WHOLE_BYTES) -> dict[str, str]:
    """SHA-256 of the weight files, in hex, and what it was taken `of`."""
    files = weight_files(folder)
    digest = hashlib.sha256()
    whole = sum(path.stat().st_size for path in files) <= whole_bytes
    for path in files:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            # a safetensors file starts with the length of its header
            left = path.stat().st_size if whole else 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            while left and (chunk := file.read(min(left, 1 << 22))):
                digest.update(chunk)
                left -= len(chunk)
    return {"sha256": digest.hexdigest(), "of": "sizes and files" if whole else "sizes and headers"}


def adapter_hash(model: PeftModel) -> str:
    """SHA-256, in hex, of what was trained, tensors with their names, in the order of the names."""
    digest = hashlib.sha256()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False) | _trained_scales(model)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _trained_scales(model: PeftModel) -> dict[str, Tensor]:
    """The stored scales and zero points, by name, of layers whose own were changed by training."""
    return {
        f"{path}.{name}": getattr(layer.quantized, name)
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLoraLinear) and layer.is_settled
        for name in layer.quantized.tensor_names
        if name != "weight"
    }


def versions() -> dict[str, Any]:
    """Versions of the libraries that had a hand in it; null for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
