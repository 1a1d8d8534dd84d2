"""qtune.json: what a folder is, what it was made of, and what it must still be elsewhere.

An adapter belongs to the exact weights that it was trained on, so they are named by a hash. Bases
of up to 16 GB are hashed whole; of larger ones the headers of the weight files and their sizes,
which tells models but not fine-tunes of one model apart. The entry `of` says which.

The recipe is there as text. Of absolute paths in it only the last part is kept: the folder is made
to be given away, and where someone's files lie is nobody's business.
"""

import hashlib
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtune import recipe_yaml
from qtune.errors import UserError
from qtune.export.folder import card, fingerprint, template
from qtune.export.folder.companions import generation_config, write_json
from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import weight_files
from qtune.model.folder import read_json
from qtune.model.lora import QuantLoraLinear
from qtune.recipe import Quant, Recipe

NAME = template.NAME
# raised when what the entries mean changes
SCHEMA = 1
# raised when qtune_kernels.packing lays codes out otherwise
LAYOUT = 1
WHOLE_BYTES = 16_000_000_000
_PACKAGES = (
    "qtune", "torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes",
    "compressed-tensors", "gguf", "xllamacpp", "onnxruntime",
)  # fmt: skip
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?/(?:[^/\s'\"]+/)*([^/\s'\"]+)")


def write(
    folder: Path, trained: Trained, form: dict[str, Any], merged_quant: Quant | None = None
) -> None:
    """Write qtune.json, after all other files; `form` says what kind of export the folder is.

    An entry `exact` in it stands in the place of what follows from the form. `merged_quant` is how
    merged weights were quantized, if they were.
    """
    recipe, tokenizer = trained.recipe, trained.tokenizer
    stops = generation_config(trained.base_folder, tokenizer)["eos_token_id"]
    value = {"schema": SCHEMA, "exact": form["form"] == "pair"} | form
    value |= {
        "base": {"model": _placed(recipe.model), "revision": recipe.revision}
        | base_hash(trained.base_folder),
        "trained_on": {"format": recipe.quant.format, "group_size": recipe.quant.group_size},
        "quantizer": quantizer(merged_quant if form["form"] == "merged" else recipe.quant),
        "adapter_sha256": adapter_hash(trained.model),
        "stop_ids": stops if isinstance(stops, list) else [stops],
        "golden": [],
        "results": None,
        "recipe": recipe_text(recipe),
        "versions": versions(),
        "tokenizer": fingerprint.tokens(tokenizer),
        "configs": fingerprint.configs(folder),
        "files": fingerprint.files(folder),
        "modules": fingerprint.modules(folder),
    }
    write_json(folder / NAME, value | template.facts(tokenizer))


def read(folder: Path) -> dict[str, Any]:
    """What qtune.json says of an export. UserError: the folder is none, or of a later qtune."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder} is no export of qtune: it has no {NAME}")
    found = read_json(path)
    if "export" not in found:
        raise UserError(f"{folder} is no export of qtune: {NAME} in it says what it was trained as")
    if found.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is no export's of this version of qtune (schema {found.get('schema')}, not "
            f"{SCHEMA}); write the export again, or take the qtune that wrote it"
        )
    return found


def add_results(
    folder: Path,
    row: dict[str, Any],
    trained_row: dict[str, Any],
    base_row: dict[str, Any] | None = None,
) -> None:
    """Put the rows of this export, the trained model and the base into qtune.json and the card."""
    rows = {"this": row, "trained": trained_row, "base": base_row}
    results = {name: found and _published(found) for name, found in rows.items()}
    write_json(folder / NAME, read(folder) | {"results": results})
    card.write(folder)


def write_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the template, and a qtune.json that says which it is: what a run's adapter has."""
    template.write_text(folder, tokenizer)
    write_json(folder / NAME, template.facts(tokenizer))


def quantizer(quant: Quant | None) -> dict[str, Any] | None:
    """What identifies how codes were found and are stored; None where weights have 16 bits, or
    are quantized by the file format alone.
    """
    if quant is None or quant.format is None:
        return None
    return {
        "format": quant.format,
        "group_size": quant.group_size,
        "method": quant.method,
        "rotate": quant.rotate,
        "layers": dict(quant.layers),
        "layout": LAYOUT,
    }


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, without the folders of absolute paths."""
    return _ABSOLUTE.sub(r"\1", recipe_yaml.dump(recipe))


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


def _placed(model: str) -> str:
    """The model as the recipe names it; what lies on this machine from everywhere on it."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def versions() -> dict[str, Any]:
    """Versions of the libraries that had a hand in it; null for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _published(value: Any) -> Any:
    """The value for JSON, which has no infinity, and without the folders of absolute paths."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: _published(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_published(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
