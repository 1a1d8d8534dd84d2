"""A quantized matrix: packed codes and scales in 8 bits, and how it is made from 16-bit weights.

Groups run over the flat matrix, as in bitsandbytes: they end inside rows only where the row length
is no multiple of the group size. The matrix is worked through in slices, so that quantizing needs
little more memory than the result.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune.errors import UserError
from qtune.quant.format import Format
from qtune_kernels.dequantize import dequantize as dequantize_op
from qtune_kernels.packing import packed_bytes
from qtune_kernels.quantize import encode, num_groups
from qtune_kernels.scales import SCALE_GROUP, Scales, dequantize_scales, quantize_scales

SMALLEST_GROUP = 16
# weights whose scales are fitted at a time: a few MiB in float32, which stays in the cache
SLICE = 1 << 19


class QuantWeight(NamedTuple):
    """A quantized matrix [O, I]: `packed` uint8 (see qtune_kernels.packing), `scales` in 8 bits."""

    packed: Tensor
    scales: Scales


def quantize(weight: Tensor, fmt: Format, group_size: int) -> QuantWeight:
    """The quantized form of a weight of any shape and float dtype, nearest level by level."""
    flat = weight.detach().reshape(-1)
    step = -(-SLICE // group_size) * group_size
    slices = [flat[at : at + step] for at in range(0, flat.numel(), step)]
    fitted = torch.cat([fmt.fit(_groups(part, group_size)) for part in slices])
    scales = quantize_scales(fitted)
    used = dequantize_scales(scales) if fmt.encodes_stored_scales else fitted
    return QuantWeight(encode(flat, used, fmt.levels, group_size), scales)


def dequantize(
    weight: QuantWeight, fmt: Format, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weights [O, I] that the codes stand for, in `dtype`."""
    made: Tensor = dequantize_op(
        weight.packed, *weight.scales, fmt.levels, group_size, *shape, dtype
    )
    return made


def storage_bytes(num_weights: int, fmt: Format, group_size: int) -> dict[str, int]:
    """Bytes of each stored tensor of a matrix with that many weights, without making it."""
    num_scales = num_groups(num_weights, group_size)
    return {
        "weight": packed_bytes(num_weights, fmt.bits),
        "scale_codes": num_scales,
        "scale_scales": num_groups(num_scales, SCALE_GROUP) * 4,
        "scale_offset": 4,
    }


def check_group_size(group_size: int) -> None:
    """Raises UserError for a size that groups cannot have."""
    if group_size < SMALLEST_GROUP or group_size & (group_size - 1):
        raise UserError(
            f"group_size ({group_size}) must be a power of two, {SMALLEST_GROUP} or more; try 64"
        )


def _groups(flat: Tensor, group_size: int) -> Tensor:
    """Float32 groups [S, G] of a flat slice, the last one filled up with zeros."""
    return pad(flat.float(), (0, -flat.numel() % group_size)).view(-1, group_size)
