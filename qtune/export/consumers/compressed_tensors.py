"""Folders of compressed-tensors as transformers loads them with the library of that name.

Weights that config.json lets it decode while loading leave keys and values alone. Where the folder
has scales for these, the library's own hooks round them as a server with an fp8 cache does.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qtune.export.folder.load import NotInstalled, load_model, with_adapter
from qtune.model.checkpoint import stored_tensors
from qtune.model.folder import read_json

MISSING = (
    "compressed-tensors, which loads and checks the export, is missing: pip install "
    "compressed-tensors"
)
SCALES = ("k_scale", "v_scale")


def is_missing() -> bool:
    """Whether the library is not installed."""
    return find_spec("compressed_tensors") is None


def load(folder: Path, device: torch.device) -> PreTrainedModel | PeftModel:
    """The model, with its adapter if the folder has one; raises NotInstalled."""
    if is_missing():
        raise NotInstalled(MISSING)
    model = load_model(folder, device)
    config = read_json(folder / "config.json")["quantization_config"]
    if config.get("dequantize") and config["kv_cache_scheme"]:
        _round_cache(model, folder, config["kv_cache_scheme"])
    return with_adapter(model, folder)


def _round_cache(model: PreTrainedModel, folder: Path, scheme: dict[str, object]) -> None:
    """Let the library round keys and values with the scales in the folder."""
    library = import_module("compressed_tensors.quantization")
    config = library.QuantizationConfig(config_groups={}, kv_cache_scheme=scheme)
    library.apply_quantization_config(model, config, show_progress=False)
    own = dict(model.named_parameters())
    for name, tensor in stored_tensors(folder):
        if name.endswith(SCALES):
            own[name].data.copy_(tensor)
