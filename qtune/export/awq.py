"""`awq`: a folder in the layout of AWQ checkpoints (`gemm`), 4 bits with zero points.

The layout knows nothing of how codes were found. A base in int4 is written as it is, one in
int4_sym with zero points amid the codes. Channel factors, which AWQ (arXiv 2306.00978) finds, have
no place in it: those of the merged form are folded into the layers before.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qtune.export.folder import int_base
from qtune.export.folder.gptqmodel_folder import GptqmodelFolder
from qtune.export.folder.int_packing import AWQ, pack_codes, pack_zeros, place_scales
from qtune.export.folder.int_weight import int_weight
from qtune.export.folder.quantized import dense_linears
from qtune.export.folder.trained import Form, Trained
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe

FORMATS: tuple[FormatName, ...] = ("int4", "int4_sym")


class AwqExporter(GptqmodelFolder):
    """Writes 4-bit codes, whole zero points and float16 scales."""

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a base of 4-bit integers, in groups that kernels know."""
        return int_base.why_not(recipe, form, FORMATS)

    def quant(self, recipe: Recipe) -> Quant:
        """INT4 with zero points, its codes found as the recipe says."""
        return int_base.merged_quant(recipe, "int4")

    def layer_tensors(self, prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        """Codes, zero points and scales of one layer; UserError where the layout has no such."""
        weight = int_weight(prefix.removesuffix("."), layer, FORMATS)
        yield f"{prefix}qweight", pack_codes(weight.codes, weight.bits, AWQ)
        yield f"{prefix}qzeros", pack_zeros(weight.zeros, weight.bits, AWQ)
        yield f"{prefix}scales", place_scales(weight.scales, AWQ).half()

    def quant_config(self, trained: Trained) -> dict[str, Any]:
        """What config.json says of the quantization."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": int_base.group_entry(trained),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense_linears(trained),
        }


EXPORTERS = {"awq": AwqExporter()}
