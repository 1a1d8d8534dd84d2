"""NF4: sixteen quantiles of a normal distribution, scaled by the largest magnitude of the group.

QLoRA, arXiv 2305.14314, section 3 and appendix E. Codes, scales and decoded weights are those of
bitsandbytes bit for bit, ties included: a value halfway between two levels takes the lower one.
"""

import torch
from torch import Tensor

from qtune_kernels.quantize import absmax

# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


class Nf4:
    """The 4-bit NormalFloat format."""

    bits = 4
    levels = LEVELS
    # as bitsandbytes does it
    encodes_stored_scales = False

    def fit(self, groups: Tensor) -> Tensor:
        """The largest magnitude of each group, float32 [...]."""
        largest: Tensor = absmax(groups, groups.shape[-1])
        return largest.view(groups.shape[:-1])

    def encode(self, groups: Tensor, scales: Tensor) -> Tensor:
        """Codes of the nearest levels, uint8 [..., G]; a group of zeros gets the code of 0."""
        # reciprocal and product instead of a division: that is what bitsandbytes rounds
        ratios = (groups * (1 / scales.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1)
        levels = torch.tensor(LEVELS, device=groups.device)
        return torch.bucketize(ratios, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weights, float32 [..., G]."""
        return torch.tensor(LEVELS, device=codes.device)[codes.int()] * scales.unsqueeze(-1)


FORMAT = Nf4()
