"""INT8: symmetric integers from -127 to 127, stored with an offset of 128.

The plain block-wise variant: 16-bit activations meet 8-bit weights. The mixed decomposition of
LLM.int8() (arXiv 2208.07339) also quantizes activations, which a frozen base for training does not
need.
"""

import torch
from torch import Tensor

from qtune_kernels.quantize import absmax


class Int8:
    """The 8-bit integer format."""

    bits = 8
    levels = ()
    # rounding scales to 8 bits can cost more than rounding the weights, unless codes make up for it
    encodes_stored_scales = True

    def fit(self, groups: Tensor) -> Tensor:
        """The largest magnitude of each group, float32 [...]."""
        largest: Tensor = absmax(groups, groups.shape[-1])
        return largest.view(groups.shape[:-1])

    def encode(self, groups: Tensor, scales: Tensor) -> Tensor:
        """Codes of the nearest integers, uint8 [..., G]; with scale 0 every code decodes to 0."""
        ratios = groups / scales.where(scales != 0, 1).unsqueeze(-1)
        return ratios.mul_(127).round_().clamp_(-127, 127).add_(128).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weights, float32 [..., G]."""
        return (codes.float() - 128) * (scales / 127).unsqueeze(-1)


FORMAT = Int8()
