"""`bitsandbytes`: a pre-quantized NF4 or FP4 folder that transformers loads with bitsandbytes.

Codes and scales are rewritten into its layout, not computed anew, so what was trained in these
formats is the same bit for bit. Written without bitsandbytes; only checking the folder needs it.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.export.folder.companions import write_config
from qtune.export.folder.load import NotInstalled, load_model, with_adapter
from qtune.export.folder.quantized import (
    config_changes,
    dense_linears,
    form_of,
    quantized_bytes,
    write_quantized,
)
from qtune.export.folder.trained import Form, Trained
from qtune.model.merge import quant_layers
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Quant, Recipe
from qtune_kernels.packing import to_bitsandbytes
from qtune_kernels.scales import SCALE_GROUP, dynamic_map

MISSING = "bitsandbytes, which loads and checks the export, is missing: pip install bitsandbytes"
# how the merged form is stored
MERGED = Storage()
GROUP_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("nf4", "fp4")


class BitsandbytesExporter:
    """Writes packed codes, scales and the quantization state of each layer."""

    consumer = "bitsandbytes"
    forms: tuple[Form, ...] = ("pair", "merged")

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The library that will load it must be there; a pair needs a base as it knows them."""
        missing = find_spec("bitsandbytes") is None
        problems = [f"{MISSING}, or leave this export out"] if missing else []
        return problems if form == "merged" else problems + _unknown(recipe.quant)

    def quant(self, recipe: Recipe) -> Quant:
        """NF4 as bitsandbytes makes it."""
        return Quant(skip=recipe.quant.skip)

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        write_quantized(trained, folder, layer_tensors)
        changes = config_changes(trained) | {"quantization_config": _quant_config(trained)}
        write_config(trained.base_folder, folder, changes)
        return form_of(trained)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model on bitsandbytes' layers, with its adapter if there is one."""
        if find_spec("bitsandbytes") is None:
            raise NotInstalled(MISSING)
        base = load_model(folder, device)
        _check_cpu(base, device)
        return with_adapter(base, folder)


def _unknown(quant: Quant) -> list[str]:
    """The first thing of the recipe's base that bitsandbytes has no word for, if any."""
    sizes = ", ".join(str(size) for size in GROUP_SIZES)
    problems = [
        (
            quant.format not in FORMATS,
            f"it holds NF4 and FP4 and quant.format is {quant.format or 'null'}; train with nf4",
        ),
        (
            quant.group_size not in GROUP_SIZES,
            f"quant.group_size {quant.group_size} is not one of {sizes}; take 64",
        ),
        (bool(quant.layers), "it has one format for all layers; leave quant.layers out"),
        (quant.rotate, "it has no rotation; set quant.rotate: false"),
        (quant.method == "awq", "it has no channel factors; set quant.method: gptq"),
    ]
    found = [f"{text}, or export the merged form" for is_there, text in problems if is_there]
    return found[:1]


def layer_tensors(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    """The entries of one NF4 or FP4 layer in a checkpoint of bitsandbytes."""
    packed, scales = layer.quant_weight
    kind, levels = layer.storage.format, layer.format.levels
    state = {
        "quant_type": kind,
        "blocksize": layer.group_size,
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
        "nested_blocksize": SCALE_GROUP,
        "nested_dtype": "float32",
        # a JSON number holds a float32 exactly
        "nested_offset": scales.offset.item(),
    }
    tensors = {
        "": to_bitsandbytes(packed, layer.out_features * layer.in_features, levels.index(0)),
        ".absmax": scales.codes,
        ".quant_map": torch.tensor(levels),
        ".nested_absmax": scales.scales,
        ".nested_quant_map": dynamic_map(torch.device("cpu")).clone(),
        f".quant_state.bitsandbytes__{kind}": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    for leaf, tensor in tensors.items():
        yield f"{prefix}weight{leaf}", tensor.detach().cpu()


def _format(trained: Trained) -> str:
    """The number format of the written folder."""
    layers = quant_layers(trained.model)
    if trained.form == "merged" or not layers:
        return MERGED.format
    return next(iter(layers.values())).storage.format


def _quant_config(trained: Trained) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": _format(trained),
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(trained.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense_linears(trained),
    }


def _check_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """UserError where this CPU's kernel takes scales of other rows (bitsandbytes 0.50, AVX-512)."""
    if device.type != "cpu" or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        width = getattr(layer, "in_features", 0)
        if state is not None and width % 16 == 0 and width % state.blocksize:
            raise UserError(
                f"the folder is right, but bitsandbytes on this CPU decodes {name} wrongly: its "
                f"{width} inputs are no multiple of {state.blocksize}; check the export on a GPU"
            )


EXPORTERS = {"bitsandbytes": BitsandbytesExporter()}
