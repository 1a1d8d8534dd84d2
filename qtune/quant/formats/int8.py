"""INT8: symmetric integers from -127 to 127, stored with an offset of 128; the scale is a step.

With `activations: int8` inputs are quantized too, row by row and outlying ones left in 16 bits, and
products are taken of integers: LLM.int8() (arXiv 2208.07339).
"""

import torch
from torch import Tensor

from qtune.quant.format import Params, ScaleKind, ZeroKind
from qtune.quant.grids import largest


class Int8:
    """The 8-bit integer format."""

    bits = 8
    levels: tuple[float, ...] = ()
    scale_kind: ScaleKind = "linear"
    zero_kind: ZeroKind | None = None
    # rounding scales to 8 bits can cost more than rounding the weights, unless codes make up for it
    encodes_stored_scales = True
    searches = False

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """A 127th of the share `keep` of the largest magnitude of each group, float32 [...]."""
        return Params(largest(groups) * keep / 127)

    def encode(self, groups: Tensor, params: Params) -> Tensor:
        """Codes of the nearest integers, uint8 [..., G]; with scale 0 every code decodes to 0."""
        ratios = groups / params.scales.where(params.scales != 0, 1).unsqueeze(-1)
        if params.zeros is not None:
            ratios.add_(params.zeros.unsqueeze(-1))
        return ratios.round_().clamp_(-127, 127).add_(128).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights, float32 [..., G]."""
        levels = codes.float() - 128
        if params.zeros is not None:
            levels.sub_(params.zeros.unsqueeze(-1))
        return levels.mul_(params.scales.unsqueeze(-1))


FORMAT = Int8()
