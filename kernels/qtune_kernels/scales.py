"""Double quantization: scales stored in 8 bits (QLoRA, arXiv 2305.14314, section 3).

The scales of a matrix, less their mean, are quantized in groups of 256 against a fixed table of
256 values between -1 and 1 whose steps grow with the value (the "dynamic" data type of arXiv
2110.02861). This is the scheme of bitsandbytes bit for bit as its CUDA kernels do it: nearest
entry by midpoint. Its CPU version looks codes up in a coarser table and differs in a quarter of a
percent of them; both decode the same here.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_GROUP = 256


class Scales(NamedTuple):
    """Scales in 8 bits: `codes` uint8 [S], `scales` float32 [S / 256], `offset` float32 [1]."""

    codes: Tensor
    scales: Tensor
    offset: Tensor


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 scale levels, float32, ascending: seven decades, each with twice as many."""
    levels = [0.0, 1.0]
    for decade in range(7):
        # on the CPU whatever the default device: one table everywhere
        bounds = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        middles = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), device=device)


def quantize_scales(scales: Tensor) -> Scales:
    """Scales, float32 [S], in 8 bits."""
    offset = scales.mean()
    groups = pad(scales - offset, (0, -scales.numel() % SCALE_GROUP)).view(-1, SCALE_GROUP)
    largest = groups.abs().amax(1)
    # reciprocal and product instead of a division: that is what bitsandbytes rounds
    ratios = (groups * (1 / largest).unsqueeze(1)).clamp(-1, 1)
    levels = dynamic_map(scales.device)
    codes = torch.bucketize(ratios, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    codes = codes.where((largest > 0).unsqueeze(1), 0)
    return Scales(codes.view(-1)[: scales.numel()].contiguous(), largest, offset.view(1))


def dequantize_scales(scales: Scales) -> Tensor:
    """Scales, float32 [S]; product and sum are rounded separately, as bitsandbytes does."""
    levels = dynamic_map(scales.codes.device).index_select(0, scales.codes.int())
    whole = levels.numel() // SCALE_GROUP
    groups = levels[: whole * SCALE_GROUP].view(whole, SCALE_GROUP)
    groups.mul_(scales.scales[:whole].unsqueeze(1))
    levels[whole * SCALE_GROUP :].mul_(scales.scales[whole:])
    return levels.add_(scales.offset)
