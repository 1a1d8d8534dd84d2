"""`awq`: a folder in the layout of AWQ checkpoints (`gemm`), 4 bits with zero points.

The layout knows nothing of how codes were found. A base in int4 is written as it is, one in
int4_sym with zero points amid the codes. Channel factors, which AWQ (arXiv 2306.00978) finds, have
no place in it: those of the merged form are folded into the layers before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.export.consumers import gptqmodel
from qtune.export.folder import int_base, vllm_lora
from qtune.export.folder.companions import write_config
from qtune.export.folder.int_packing import AWQ, pack_codes, pack_zeros, place_scales
from qtune.export.folder.int_weight import int_weight
from qtune.export.folder.quantized import (
    config_changes,
    dense_linears,
    form_of,
    quantized_bytes,
    write_quantized,
)
from qtune.export.folder.trained import Form, Trained
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe

FORMATS: tuple[FormatName, ...] = ("int4", "int4_sym")


class AwqExporter:
    """Writes 4-bit codes, whole zero points and float16 scales."""

    consumer = "gptqmodel"
    forms: tuple[Form, ...] = ("pair", "merged")

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a base of 4-bit integers, in groups that kernels know."""
        return int_base.why_not(recipe, form, FORMATS)

    def quant(self, recipe: Recipe) -> Quant:
        """INT4 with zero points, its codes found as the recipe says."""
        return int_base.merged_quant(recipe, "int4")

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of codes, scales, what stays in 16 bits and the adapter."""
        return quantized_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the weights, config.json and, in the pair form, the adapter."""
        write_quantized(trained, folder, layer_tensors)
        config = {"quantization_config": _quant_config(trained)}
        write_config(trained.base_folder, folder, config_changes(trained) | config)
        return form_of(trained) | vllm_lora.notes(folder)

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model on gptqmodel's layers, with its adapter if there is one."""
        return gptqmodel.load(folder, device)


def layer_tensors(prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    """The entries of one layer, whose name with the dot is `prefix`, in an AWQ checkpoint.

    Raises UserError for a layer that the layout cannot hold.
    """
    weight = int_weight(prefix.removesuffix("."), layer, FORMATS)
    yield f"{prefix}qweight", pack_codes(weight.codes, weight.bits, AWQ)
    yield f"{prefix}qzeros", pack_zeros(weight.zeros, weight.bits, AWQ)
    yield f"{prefix}scales", place_scales(weight.scales, AWQ).half()


def _quant_config(trained: Trained) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": int_base.group_entry(trained),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense_linears(trained),
    }


EXPORTERS = {"awq": AwqExporter()}
