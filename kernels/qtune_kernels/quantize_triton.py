"""The CUDA kernels of `absmax` and `encode`: weights in, scales or packed bytes out, one pass each.

The nearest level is found by counting the boundaries below a ratio, not by distances: three
instructions or less for each. Quotients are rounded as IEEE demands and nothing is contracted
(`enable_fp_fusion=False`), so that codes are those of the plain PyTorch version.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.nearest import SMALLEST_SCALE, boundaries
from qtune_kernels.packing import RUN_SEGMENTS, SEGMENT, code_bits, packed_bytes

_SEGMENT = tl.constexpr(SEGMENT)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# added to a float32 below it and taken off again, it rounds to the nearest even integer
_ROUNDER = tl.constexpr(12582912.0)
# weights that a program of four warps reads
PROGRAM_WEIGHTS = 8192


def absmax(weight: Tensor, group_size: int) -> Tensor:
    """The largest magnitude of each group, float32 [groups]."""
    flat = weight.reshape(-1)
    largest = flat.new_empty(triton.cdiv(flat.numel(), group_size), dtype=torch.float32)
    # a power of two, of which groups are made
    block = gcd(group_size, PROGRAM_WEIGHTS)
    groups = PROGRAM_WEIGHTS // block
    with torch.cuda.device_of(flat):
        _absmax_kernel[(triton.cdiv(largest.numel(), groups),)](
            flat,
            largest,
            flat.numel(),
            largest.numel(),
            GROUP=group_size,
            GROUPS=groups,
            BLOCK=block,
            num_warps=4,
        )
    return largest


def encode(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Sequence[float], group_size: int
) -> Tensor:
    """Storage bytes, uint8, of a weight, its scales and its zero points, float32."""
    flat, bits = weight.reshape(-1), code_bits(levels)
    packed = flat.new_empty(packed_bytes(flat.numel(), bits), dtype=torch.uint8)
    unit = gcd(group_size, SEGMENT)
    tables = search_tables(tuple(levels), flat.device) if levels else ()
    with torch.cuda.device_of(flat):
        (_encode_levels_kernel if levels else _encode_8bit_kernel)[
            (triton.cdiv(flat.numel(), PROGRAM_WEIGHTS),)
        ](
            flat,
            scales,
            zeros,
            *tables,
            packed,
            flat.numel(),
            **({"BITS": bits, "SEGMENTS": RUN_SEGMENTS[bits]} if levels else {}),
            GROUP=group_size,
            UNIT=unit,
            UNITS=PROGRAM_WEIGHTS // RUN_SEGMENTS[bits] // unit,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return packed


@cache
def search_tables(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Boundaries, float32 [levels - 1], and the code of the lowest level with what each adds.

    The latter is int32 [levels]: the boundaries below a ratio add up to its code.
    """
    bounds, codes = boundaries(levels)
    steps = codes.diff(prepend=codes.new_zeros(1))
    return bounds.to(device), steps.to(device, torch.int32)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _absmax_kernel(
    weight_ptr,
    largest_ptr,
    num_weights,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, BLOCK)[None, :]
    largest = tl.full((GROUPS, BLOCK), 0.0, tl.float32)
    for _ in range(0, GROUP, BLOCK):
        weight = tl.load(weight_ptr + at, mask=at < num_weights, other=0.0).to(tl.float32)
        largest = _larger(largest, tl.abs(weight))
        at += BLOCK
    tl.store(largest_ptr + group, tl.reduce(largest, 1, _larger), mask=group < num_groups)


@triton.jit
def _encode_levels_kernel(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bounds_ptr,
    steps_ptr,
    packed_ptr,
    num_weights,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):
    # a lane holds the weight at one place of each segment of a run; a unit is UNIT lanes, whose
    # weights in one segment lie in one quantization group
    RUN: tl.constexpr = SEGMENTS * _SEGMENT
    RUN_BYTES: tl.constexpr = RUN * BITS // 8
    program = tl.program_id(0).to(tl.int64)
    first = program * (UNITS * UNIT * SEGMENTS)
    num_left = tl.minimum(num_weights - first, UNITS * UNIT * SEGMENTS).to(tl.int32)
    unit = tl.arange(0, UNITS) * UNIT
    lane = unit[:, None] + tl.arange(0, UNIT)[None, :]
    run = lane // _SEGMENT
    byte_at = packed_ptr + program * (UNITS * UNIT * SEGMENTS * BITS // 8)
    byte_at += run * RUN_BYTES + lane % _SEGMENT
    live_run = run * RUN < num_left
    low = tl.full((UNITS, UNIT), 0, tl.int32)
    high = tl.full((UNITS, UNIT), 0, tl.int32)
    for segment in tl.static_range(SEGMENTS):
        unit_at = unit // _SEGMENT * RUN + segment * _SEGMENT + unit % _SEGMENT
        at = run * RUN + segment * _SEGMENT + lane % _SEGMENT
        live = at < num_left
        group = (first + unit_at) // GROUP
        scale = tl.load(scales_ptr + group, mask=unit_at < num_left, other=1.0)
        scale = tl.where(tl.abs(scale) > _SMALLEST_SCALE, scale, _SMALLEST_SCALE)
        weight = tl.load(weight_ptr + first + at, mask=live, other=0.0).to(tl.float32)
        ratio = weight * tl.div_rn(1.0, scale)[:, None]
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + group, mask=unit_at < num_left, other=0.0)
            ratio += zero[:, None]
        code = tl.full((UNITS, UNIT), 0, tl.int32) + tl.load(steps_ptr)
        for level in tl.static_range(1, 1 << BITS):
            above = ratio > tl.load(bounds_ptr + level - 1)
            code += tl.where(above, tl.load(steps_ptr + level), 0)
        code = tl.where(live, code, 0)
        if BITS == 3:
            low |= (code & 3) << 2 * (segment % 4)
            high |= code >> 2 << segment
            if segment % 4 == 3:
                tl.store(byte_at + segment // 4 * _SEGMENT, low.to(tl.uint8), mask=live_run)
                low = tl.full((UNITS, UNIT), 0, tl.int32)
        else:
            low |= code << BITS * segment
    if BITS == 3:
        tl.store(byte_at + 2 * _SEGMENT, high.to(tl.uint8), mask=live_run)
    else:
        tl.store(byte_at, low.to(tl.uint8), mask=live_run)


@triton.jit
def _encode_8bit_kernel(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    packed_ptr,
    num_weights,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (UNIT * UNITS)
    num_left = tl.minimum(num_weights - first, UNIT * UNITS).to(tl.int32)
    unit_at = tl.arange(0, UNITS) * UNIT
    at = unit_at[:, None] + tl.arange(0, UNIT)[None, :]
    group = (first + unit_at) // GROUP
    scale = tl.load(scales_ptr + group, mask=unit_at < num_left, other=1.0)
    scale = tl.where(scale != 0.0, scale, 1.0)
    weight = tl.load(weight_ptr + first + at, mask=at < num_left, other=0.0).to(tl.float32)
    ratio = tl.div_rn(weight, tl.broadcast_to(scale[:, None], [UNITS, UNIT]))
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + group, mask=unit_at < num_left, other=0.0)
        ratio += zero[:, None]
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    code = (ratio + _ROUNDER) - _ROUNDER + 128.0
    tl.store(packed_ptr + first + at, code.to(tl.uint8), mask=at < num_left)
