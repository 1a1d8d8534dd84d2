"""`gptq` and `gptq-int8`: folders in the layout of GPTQ checkpoints, which vLLM and gptqmodel load.

Only the first version of the layout is read everywhere. It stores zero points less one, so 0 has no
place in it, and vLLM ignores them: formats without zero points it is. Nothing is reordered
(`desc_act`). GPTQ, arXiv 2210.17323, is how the codes of the merged form are found by default; the
layout does not depend on it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.folder import int_base
from qtune.export.folder.gptqmodel_folder import GptqmodelFolder
from qtune.export.folder.int_packing import GPTQ, pack_codes, pack_zeros, place_scales
from qtune.export.folder.int_weight import MIDDLE, int_weight
from qtune.export.folder.quantized import dense_linears, quantized_weights
from qtune.export.folder.trained import Form, Trained
from qtune.quant.linear import QuantLinear
from qtune.recipe import FormatName, Quant, Recipe


@dataclass(frozen=True)
class GptqExporter(GptqmodelFolder):
    """Writes codes of one `format`, float16 scales, zero points and the group of each input."""

    format: FormatName
    bits: int

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """A pair needs a base without zero points, in groups that kernels know."""
        if form == "pair" and self.format == "int4_sym" and recipe.quant.format == "int4":
            return [
                "it has no zero points; set quant.format: int4_sym, export awq or "
                "compressed-tensors-w4a16, or export the merged form"
            ]
        return int_base.why_not(recipe, form, (self.format,))

    def quant(self, recipe: Recipe) -> Quant:
        """The format of the container, its codes found as the recipe says."""
        return int_base.merged_quant(recipe, self.format)

    def layer_tensors(self, prefix: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        """Codes, zero points, scales and groups of one layer; UserError for what has no place."""
        weight = int_weight(prefix.removesuffix("."), layer, MIDDLE)
        inputs = torch.arange(layer.in_features, dtype=torch.int32)
        yield f"{prefix}qweight", pack_codes(weight.codes, weight.bits, GPTQ)
        yield f"{prefix}qzeros", pack_zeros(weight.zeros, weight.bits, GPTQ)
        yield f"{prefix}scales", place_scales(weight.scales, GPTQ).half()
        yield f"{prefix}g_idx", inputs // weight.group_size

    def quant_config(self, trained: Trained) -> dict[str, Any]:
        """What config.json says of the quantization.

        Raises UserError where layers of one kind are in 16 bits in some blocks only.
        """
        config = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": int_base.group_entry(trained),
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
        dense = set(map(_kind, dense_linears(trained))) - {""}
        kinds = set(map(_kind, quantized_weights(trained)))
        if dense & kinds:
            raise UserError(
                f"GPTQ folders name layers by their kind, and {min(dense & kinds)} is in 16 bits "
                "in some blocks only; name the kind in quant.skip"
            )
        return config | ({"modules_in_block_to_quantize": [sorted(kinds)]} if dense else {})


def _kind(name: str) -> str:
    """What a layer is called within its block, as `mlp.up_proj`; empty outside of blocks."""
    parts = re.split(r"\.\d+\.", name.removesuffix(".weight"), maxsplit=1)
    return parts[1] if len(parts) == 2 else ""


EXPORTERS = {"gptq": GptqExporter("int4_sym", 4), "gptq-int8": GptqExporter("int8", 8)}
