"""The CUDA kernel of `scale_gradient`: a tile of dW stays in registers, and two sums of it leave.

A program takes [features, columns] of dW, summed over all rows of dy and x on tensor cores. Only
then are the codes of that tile read, once, segment by segment of the flat matrix, so rows need not
be whole runs. Sums over units, the part of a group in one segment, are joined by plain PyTorch: a
64th of the matrix, in a fixed order.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.dequantize_triton import levels_table
from qtune_kernels.packing import SEGMENT, code_bits
from qtune_kernels.scale_gradient import join_units

_SEGMENT = tl.constexpr(SEGMENT)
BLOCK_O, BLOCK_I, BLOCK_T = 128, 128, 64
WARPS, STAGES = 8, 3
# units narrower than this are no tiles that the compiler splits well
LEAST_UNIT = 16


def takes(dy: Tensor, x: Tensor, group_size: int) -> bool:
    """Whether the kernel computes this; rows of x are whole segments, which rotated ones are."""
    whole = x.shape[-1] % SEGMENT == 0
    fits = group_size % SEGMENT == 0 or (SEGMENT % group_size == 0 and group_size >= LEAST_UNIT)
    return whole and fits and dy.dtype == x.dtype and x.itemsize == 2


def scale_gradient(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    """The sums of dW * level and of dW over each group, float32 [S], of dy [T, O] and x [T, I]."""
    # rows may lie apart, with room behind them
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    num_rows, out_features = dy.shape
    in_features = x.shape[1]
    unit = gcd(group_size, SEGMENT)
    num_units = out_features * in_features // unit
    units = [dy.new_empty(num_units, dtype=torch.float32) for _ in range(2)]
    grid = (triton.cdiv(out_features, BLOCK_O), triton.cdiv(in_features, BLOCK_I))
    table = (levels_table(tuple(levels), packed.device),) if levels else (None,)
    with torch.cuda.device_of(dy):
        _scale_gradient_kernel[grid](
            dy,
            x,
            packed,
            *table,
            *units,
            dy.stride(0),
            x.stride(0),
            num_rows,
            out_features,
            in_features,
            BITS=code_bits(levels),
            UNIT=unit,
            BLOCK_O=BLOCK_O,
            BLOCK_I=BLOCK_I,
            BLOCK_T=BLOCK_T,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=True,
        )
    joined = [join_units(sums, 0, group_size // unit)[1] for sums in units]
    return joined[0], joined[1]


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _codes(packed_ptr, segment, column, live, BITS: tl.constexpr):
    """Codes, int32, at the columns of 64 of segments of the flat matrix; see packing.py."""
    if BITS == 8:
        at = segment * _SEGMENT + column
        code = tl.load(packed_ptr + at, mask=live, other=0).to(tl.int32)
    elif BITS == 3:
        place = (segment % 8).to(tl.int32)
        run_at = segment // 8 * (3 * _SEGMENT) + column
        low = tl.load(packed_ptr + run_at + place // 4 * _SEGMENT, mask=live, other=0)
        high = tl.load(packed_ptr + run_at + 2 * _SEGMENT, mask=live, other=0)
        code = low.to(tl.int32) >> place % 4 * 2 & 3
        code |= (high.to(tl.int32) >> place & 1) << 2
    else:
        SHARING: tl.constexpr = 8 // BITS
        place = (segment % SHARING).to(tl.int32)
        at = segment // SHARING * _SEGMENT + column
        byte = tl.load(packed_ptr + at, mask=live, other=0).to(tl.int32)
        code = byte >> place * BITS & (1 << BITS) - 1
    return code


@triton.jit
def _store_units(units_ptr, tile, at, live, BLOCK_O: tl.constexpr, UNITS: tl.constexpr):
    """Store the sums over units of a [features, columns] tile."""
    UNIT: tl.constexpr = tile.shape[1] // UNITS
    sums = tl.reduce(tl.reshape(tile, [BLOCK_O, UNITS, UNIT]), 2, _plus)
    tl.store(units_ptr + at, sums, mask=live)


@triton.jit
def _scale_gradient_kernel(
    dy_ptr,
    x_ptr,
    packed_ptr,
    levels_ptr,
    level_units_ptr,
    weight_units_ptr,
    dy_stride,
    x_stride,
    num_rows,
    out_features,
    in_features,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    UNITS: tl.constexpr = BLOCK_I // UNIT
    feature = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    row = tl.arange(0, BLOCK_T)
    has_feature, has_column = feature < out_features, column < in_features
    gradient = tl.full((BLOCK_O, BLOCK_I), 0.0, tl.float32)
    for first in range(0, num_rows, BLOCK_T):
        here = first + row
        at = here.to(tl.int64)
        dy_live = has_feature[:, None] & (here < num_rows)[None, :]
        dy_at = dy_ptr + at[None, :] * dy_stride + feature[:, None]
        x_live = (here < num_rows)[:, None] & has_column[None, :]
        x_at = x_ptr + at[:, None] * x_stride + column[None, :]
        dy = tl.load(dy_at, mask=dy_live, other=0.0)
        x = tl.load(x_at, mask=x_live, other=0.0)
        gradient = tl.dot(dy, x, gradient)

    live = has_feature[:, None] & has_column[None, :]
    row_segments = in_features // _SEGMENT
    segment = feature.to(tl.int64)[:, None] * row_segments + (column // _SEGMENT)[None, :]
    code = _codes(packed_ptr, segment, (column % _SEGMENT)[None, :], live, BITS)
    level = (code - 128).to(tl.float32) if levels_ptr is None else tl.load(levels_ptr + code)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    row_units = in_features // UNIT
    unit_at = feature.to(tl.int64)[:, None] * row_units + unit[None, :]
    unit_live = has_feature[:, None] & (unit < row_units)[None, :]
    _store_units(level_units_ptr, gradient * level, unit_at, unit_live, BLOCK_O, UNITS)
    _store_units(weight_units_ptr, gradient, unit_at, unit_live, BLOCK_O, UNITS)
