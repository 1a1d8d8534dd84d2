"""What kernels are told of a quantized matrix: how it is stored, and where its parts lie."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qtune_kernels.cpu.groups import FLOATS, Layout
from qtune_kernels.cpu.simd import LANES
from qtune_kernels.packing import code_bits
from qtune_kernels.scales import Scales, dynamic_map

SCALE_KINDS = {torch.uint8, torch.int8, *FLOATS}
ZERO_KINDS = {None, torch.uint8, *FLOATS}


def layout(scales: Scales, levels: Sequence[float], group_size: int) -> Layout:
    """How a matrix with these arguments of `dequantize` is stored."""
    zeros = None if scales.zeros is None else scales.zeros.dtype
    return Layout(code_bits(levels), group_size, scales.codes.dtype, zeros)


def decodes(found: Layout) -> bool:
    """Whether kernels know this way of storing; there are no whole zeros of 8-bit codes."""
    known = found.scales in SCALE_KINDS and found.zeros in ZERO_KINDS
    whole = found.zeros == torch.uint8
    return known and found.group_size >= LANES and not (whole and found.bits == 8)


def places(packed: Tensor, scales: Scales, levels: Sequence[float]) -> tuple[int, ...]:
    """The arguments of kernels that become `groups.Places`; 0 for what is not there."""
    tables = (dynamic_map(packed.device), level_table(tuple(levels)))
    parts = (packed, *scales, *tables)
    return *(0 if part is None else part.data_ptr() for part in parts), scales.codes.numel()


@cache
def level_table(levels: tuple[float, ...]) -> Tensor:
    """The levels of a format repeated to 16, float32; zeros where there are none."""
    with torch.inference_mode(False):
        return torch.tensor(levels or (0.0,), dtype=torch.float32).repeat(
            LANES // max(1, len(levels))
        )
