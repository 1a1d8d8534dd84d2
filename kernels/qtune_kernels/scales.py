"""What the weights of a group share: a scale and maybe a zero point, and how both are stored.

A weight is (level - zero) * scale. The dtype of `Scales.codes` tells the kind of scales:

uint8, dynamic
    Double quantization (QLoRA, arXiv 2305.14314, section 3). The scales of a matrix, less their
    mean, are quantized in groups of 256 against a fixed table of 256 values between -1 and 1 whose
    steps grow with the value (the "dynamic" data type of arXiv 2110.02861). This is the scheme of
    bitsandbytes bit for bit as its CUDA kernels do it: nearest entry by midpoint. Its CPU version
    looks codes up in a coarser table and differs in a quarter of a percent of them; both decode the
    same here.
int8, linear
    Whole numbers of steps from an offset. Steps are powers of two, one for 256 scales, and no more
    than a 2047th of any of those, so that each scale is a float16 number: other programs, which
    keep scales in that type, get the same weights.
float16 or float32
    The scales themselves.

Zero points are whole numbers of 2 or 4 bits, in bytes, or numbers of one of those two types.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_GROUP = 256
# bits of a stored whole zero point, by the bits of a code
ZERO_BITS = {2: 2, 3: 4, 4: 4}
# the largest number of steps that float16 has room for in every binade
_MOST_STEPS = 2047
# the smallest number of float16
_SMALLEST_STEP = 2.0**-24


class Scales(NamedTuple):
    """Scales as stored, `codes` [S], and zero points.

    Of scales that are codes, `scales` is float32 [S / 256] and `offset` float32 [1]; of others both
    are empty.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor
    zeros: Tensor | None = None
    """None, uint8 of `pack_zeros`, or float16 or float32 [S]."""


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
    """Scales, float32 [S], of the dynamic kind."""
    offset = scales.mean()
    groups = pad(scales - offset, (0, -scales.numel() % SCALE_GROUP)).view(-1, SCALE_GROUP)
    largest = groups.abs().amax(1)
    # reciprocal and product instead of a division: that is what bitsandbytes rounds
    ratios = (groups * (1 / largest).unsqueeze(1)).clamp(-1, 1)
    levels = dynamic_map(scales.device)
    codes = torch.bucketize(ratios, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    codes = codes.where((largest > 0).unsqueeze(1), 0)
    return Scales(codes.view(-1)[: scales.numel()].contiguous(), largest, offset.view(1))


def linear_scales(scales: Tensor) -> Scales:
    """Scales, float32 [S], of the linear kind; the decoded ones are float16 numbers up to 65504."""
    num_scales = scales.numel()
    missing = -num_scales % SCALE_GROUP
    groups = torch.cat([scales, scales[-1:].expand(missing)]).view(-1, SCALE_GROUP)
    least, most = groups.amin(1), groups.amax(1)
    # amid the most common range, so that codes of both signs are used
    middle = ((least + most) / 2).median()
    largest_step = _steps(least, most, middle).amax()
    offset = (middle / largest_step).round() * largest_step
    # moving the offset may ask for a step that it is no multiple of
    steps = _steps(least, most, offset).minimum(largest_step)
    codes = ((groups - offset) / steps.unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
    return Scales(codes.view(-1)[:num_scales].contiguous(), steps, offset.view(1))


def _steps(least: Tensor, most: Tensor, offset: Tensor) -> Tensor:
    """The smallest power of two, for each group, that reaches from the offset to both ends."""
    reach = torch.maximum(most - offset, offset - least) / 127.5
    # a decoded scale is up to half a step larger than the largest one
    finest = torch.maximum(least.abs(), most.abs()) / (_MOST_STEPS - 0.5)
    return torch.maximum(reach, finest).clamp(min=_SMALLEST_STEP).log2().ceil().exp2()


def dequantize_scales(scales: Scales) -> Tensor:
    """Scales, float32 [S]; product and sum are rounded separately, as bitsandbytes does."""
    codes = scales.codes
    if codes.is_floating_point():
        return codes.float()
    levels = codes.float()
    if codes.dtype == torch.uint8:
        levels = dynamic_map(codes.device).index_select(0, codes.int())
    whole = levels.numel() // SCALE_GROUP
    groups = levels[: whole * SCALE_GROUP].view(whole, SCALE_GROUP)
    groups.mul_(scales.scales[:whole].unsqueeze(1))
    levels[whole * SCALE_GROUP :].mul_(scales.scales[whole:])
    return levels.add_(scales.offset)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Bytes, uint8, of whole zero points [S] for codes of `bits`, the first in the lowest bits."""
    field = ZERO_BITS[bits]
    fields = zeros.to(torch.uint8)
    fields = pad(fields, (0, -fields.numel() % (8 // field))).view(-1, 8 // field)
    packed = fields[:, 0].clone()
    for place in range(1, 8 // field):
        packed |= fields[:, place] << field * place
    return packed


def unpack_zeros(zeros: Tensor, bits: int, num_zeros: int) -> Tensor:
    """Zero points, float32 [num_zeros], of stored ones of any kind, for codes of `bits`."""
    if zeros.is_floating_point():
        return zeros.float()
    field = ZERO_BITS[bits]
    places = [zeros >> field * place & (1 << field) - 1 for place in range(8 // field)]
    return torch.stack(places, 1).view(-1)[:num_zeros].float()
