"""`bitsandbytes`: a pre-quantized NF4 folder that transformers loads with bitsandbytes.

Codes and scales are rewritten into its layout, not computed anew, so what was trained in NF4 is the
same bit for bit. Written without bitsandbytes; only checking the folder needs it.
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
from qtune.export.folder.load import load_model, with_adapter
from qtune.export.folder.quantized import (
    config_changes,
    dense_linears,
    form_of,
    quantized_bytes,
    write_quantized,
)
from qtune.export.folder.trained import Form, Trained
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe
from qtune_kernels.packing import to_bitsandbytes
from qtune_kernels.scales import SCALE_GROUP, dynamic_map

MISSING = "bitsandbytes, which loads and checks the export, is missing: pip install bitsandbytes"
GROUP_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


class BitsandbytesExporter:
    """Writes packed codes, scales and the quantization state of each layer."""

    consumer = "bitsandbytes"

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """The library that will load it must be there; a pair needs NF4 in groups that it knows."""
        quant, missing = recipe.quant, find_spec("bitsandbytes") is None
        problems = [f"{MISSING}, or leave this export out"] if missing else []
        if form == "merged":
            return problems
        if quant.format != "nf4":
            is_now = f"is {quant.format}" if quant.format else "is null"
            problems.append(
                f"it holds NF4 only and quant.format {is_now}; train with nf4, or "
                "export the merged form"
            )
        elif quant.group_size not in GROUP_SIZES:
            sizes = ", ".join(str(size) for size in GROUP_SIZES)
            problems.append(
                f"quant.group_size {quant.group_size} is not one of {sizes}; take 64, "
                "or export the merged form"
            )
        return problems

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        write_quantized(trained, folder, layer_tensors, "nf4", 64)
        changes = config_changes(trained) | {"quantization_config": _quant_config(trained)}
        write_config(trained.base_folder, folder, changes)
        return form_of(trained)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model on bitsandbytes' layers, with its adapter if there is one."""
        if find_spec("bitsandbytes") is None:
            raise UserError(MISSING)
        base = load_model(folder, device)
        _check_cpu(base, device)
        return with_adapter(base, folder)


def layer_tensors(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    """The entries of one NF4 layer in a checkpoint of bitsandbytes."""
    packed, scales = layer.quant_weight
    state = {
        "quant_type": "nf4",
        "blocksize": layer.group_size,
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
        "nested_blocksize": SCALE_GROUP,
        "nested_dtype": "float32",
        # a JSON number holds a float32 exactly
        "nested_offset": scales.offset.item(),
    }
    tensors = {
        "": to_bitsandbytes(packed, layer.out_features * layer.in_features),
        ".absmax": scales.codes,
        ".quant_map": torch.tensor(layer.format.levels),
        ".nested_absmax": scales.scales,
        ".nested_quant_map": dynamic_map(torch.device("cpu")).clone(),
        ".quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    for leaf, tensor in tensors.items():
        yield f"{prefix}weight{leaf}", tensor.detach().cpu()


def _quant_config(trained: Trained) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
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


EXPORTER = BitsandbytesExporter()
