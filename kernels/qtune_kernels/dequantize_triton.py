"""The CUDA kernels of `dequantize`: one launch, codes and scale codes in, rounded weights out.

Levels come from `tl.gather` on a float32 table, which the compiler keeps in shared memory: exact,
and 8 to 10 instructions a weight where a chain of selects among 16 takes 22. Levels that are one
apart need no table, only a conversion. Products and sums stay apart (`enable_fp_fusion=False`), so
that the bits are those of the plain PyTorch version.

How scales and zero points are stored, kernels see by the types of their pointers.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.packing import SEGMENT, STRIP_SEGMENTS, code_bits
from qtune_kernels.rows import ALIGNMENT
from qtune_kernels.scales import SCALE_GROUP, Scales, dynamic_map

_SEGMENT = tl.constexpr(SEGMENT)
_SCALE_GROUP = tl.constexpr(SCALE_GROUP)
_ALIGNMENT = tl.constexpr(ALIGNMENT)
# weights that a program of four warps writes
PROGRAM_WEIGHTS = 16384


def dequantize_into(
    out: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """Write the first `out.numel()` weights into `out`, of any float dtype, flat or [O, I].

    Rows of a matrix may lie apart where `reaches` says so.
    """
    bits = code_bits(levels)
    num_segments = STRIP_SEGMENTS[bits] if levels else 1
    unit = gcd(group_size, SEGMENT)
    kernel = _dequantize_levels_kernel if levels else _dequantize_8bit_kernel
    table: tuple[Tensor, ...] = ()
    layout: dict[str, float | None] = {}
    if levels:
        table = (levels_table(tuple(levels), packed.device),)
        first = first_of_counted(tuple(levels))
        layout = {"BITS": bits, "SEGMENTS": num_segments, "FIRST": first}
    if not out.is_contiguous():
        gap = out.stride(0) - out.shape[1]
        layout |= {"units_a_row": out.shape[1] // unit, "gaps": gap // ALIGNMENT}
    with torch.cuda.device_of(packed):
        kernel[(triton.cdiv(out.numel(), PROGRAM_WEIGHTS),)](
            packed,
            *scales,
            dynamic_map(packed.device),
            *table,
            out,
            out.numel(),
            **layout,
            GROUP=group_size,
            UNIT=unit,
            UNITS=PROGRAM_WEIGHTS // num_segments // unit,
            num_warps=4,
            enable_fp_fusion=False,
        )


def reaches(out: Tensor, group_size: int) -> bool:
    """Whether `dequantize_into` can write the rows of `out` [O, I] where they lie.

    Apart, they must be whole units of weights that are written together, and stay aligned: gaps are
    counted in multiples of that, so that the compiler knows.
    """
    whole_units = out.shape[1] % gcd(group_size, SEGMENT) == 0
    aligned = out.stride(1) == 1 and out.stride(0) % ALIGNMENT == out.shape[1] % ALIGNMENT == 0
    return out.is_contiguous() or (whole_units and aligned)


@cache
def levels_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels, float32 [2^bits], on the device."""
    return torch.tensor(levels, dtype=torch.float32, device=device)


@cache
def first_of_counted(levels: tuple[float, ...]) -> float | None:
    """The level of code 0, if each of the others is one more than that before it; else None."""
    counted = all(level == levels[0] + code for code, level in enumerate(levels))
    return levels[0] if counted else None


@triton.jit
def load_offset(codes_ptr, offset_ptr):
    """The number that scales which are codes have in common; of others, 0."""
    return 0.0 if codes_ptr.dtype.element_ty.is_floating() else tl.load(offset_ptr)


@triton.jit
def _load_where(at, live):
    """What lies there; where not `live` (None: all are), nothing is read."""
    return tl.load(at) if live is None else tl.load(at, mask=live, other=0)


@triton.jit
def group_scale(codes_ptr, scales_ptr, offset, map_ptr, group, live):
    """Float32 scales of quantization groups; where not `live` (None: all are), nothing is read."""
    code = _load_where(codes_ptr + group, live)
    if codes_ptr.dtype.element_ty.is_floating():
        scale = code.to(tl.float32)
    else:
        spread = _load_where(scales_ptr + group // _SCALE_GROUP, live)
        if codes_ptr.dtype.element_ty == tl.int8:
            level = code.to(tl.float32)
        else:
            level = tl.load(map_ptr + code.to(tl.int32))
        scale = level * spread + offset
    return scale


@triton.jit
def group_zero(zeros_ptr, group, live, BITS: tl.constexpr):
    """Float32 zero points of quantization groups; where not `live`, nothing is read."""
    if zeros_ptr.dtype.element_ty.is_floating():
        zero = _load_where(zeros_ptr + group, live).to(tl.float32)
    else:
        # as in `scales.ZERO_BITS`
        FIELD: tl.constexpr = 2 if BITS == 2 else 4
        FIELDS: tl.constexpr = 8 // FIELD
        byte = _load_where(zeros_ptr + group // FIELDS, live).to(tl.int32)
        shift = (group % FIELDS).to(tl.int32) * FIELD
        zero = (byte >> shift & (1 << FIELD) - 1).to(tl.float32)
    return zero


@triton.jit
def _gaps_before(weight, units_a_row, gaps, UNIT: tl.constexpr):
    """How much further on units lie, given their first weights, for the gaps behind rows."""
    return ((weight // UNIT).to(tl.int32) // units_a_row).to(tl.int64) * gaps * _ALIGNMENT


@triton.jit
def _spread(of_units, UNITS: tl.constexpr, UNIT: tl.constexpr):
    """What each of the bytes of units has of its unit."""
    return tl.reshape(tl.broadcast_to(of_units[:, None], [UNITS, UNIT]), [UNITS * UNIT])


@triton.jit
def _load_bytes(packed_ptr, byte, live, BITS: tl.constexpr):
    """The bytes of a program's strips; of 3 bits in int32, with those of the high bits above them.

    `byte` counts the bytes of strips alone; a run of 3 bits is two strips and 64 bytes more. The
    high bits of a strip's segments are moved to the lowest places.
    """
    if BITS == 3:
        run = byte // (2 * _SEGMENT)
        packed = tl.load(packed_ptr + byte + run * _SEGMENT, mask=live, other=0).to(tl.int32)
        high_at = run * (3 * _SEGMENT) + 2 * _SEGMENT + byte % _SEGMENT
        high = tl.load(packed_ptr + high_at, mask=live, other=0).to(tl.int32)
        packed |= high >> byte // _SEGMENT % 2 * 4 << 8
    else:
        packed = tl.load(packed_ptr + byte, mask=live, other=0)
    return packed


@triton.jit
def _dequantize_levels_kernel(
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    levels_ptr,
    weights_ptr,
    num_weights,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    FIRST: tl.constexpr,
    units_a_row=None,
    gaps=0,
):
    # a strip is 64 bytes with SEGMENTS segments; a unit is UNIT bytes of it, in which the codes of
    # each segment lie in one quantization group
    BYTES: tl.constexpr = UNIT * UNITS
    FIELD: tl.constexpr = 8 // SEGMENTS
    GAP: tl.constexpr = (SEGMENTS - 1) * _SEGMENT
    program = tl.program_id(0).to(tl.int64)
    first = program * (SEGMENTS * BYTES)
    num_left = tl.minimum(num_weights - first, SEGMENTS * BYTES).to(tl.int32)
    byte = tl.arange(0, BYTES)
    first_at = byte + byte // _SEGMENT * GAP
    unit = tl.arange(0, UNITS) * UNIT
    first_unit_at = unit + unit // _SEGMENT * GAP
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    if FIRST is None:
        levels = tl.load(levels_ptr + tl.arange(0, 1 << BITS))
    packed_ptr += program * (SEGMENTS * BYTES * BITS // 8)
    packed = _load_bytes(packed_ptr, byte, first_at < num_left, BITS)
    for segment in tl.static_range(SEGMENTS):
        unit_at = first_unit_at + segment * _SEGMENT
        group = (first + unit_at) // GROUP
        live_unit = unit_at < num_left
        scale = group_scale(
            scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, group, live_unit
        )
        code = packed >> FIELD * segment & (1 << FIELD) - 1
        if BITS == 3:
            code |= packed >> 6 + segment & 4
        if FIRST is None:
            weight = tl.gather(levels, code.to(tl.int32), 0)
        else:
            weight = code.to(tl.float32)
            if FIRST != 0.0:
                weight += FIRST
        if zeros_ptr is not None:
            zero = group_zero(zeros_ptr, group, live_unit, BITS)
            weight -= _spread(zero, UNITS, UNIT)
        weight *= _spread(scale, UNITS, UNIT)
        at = first_at + segment * _SEGMENT
        weight = weight.to(weights_ptr.dtype.element_ty)
        live = at < num_left
        if units_a_row is not None:
            ahead = _gaps_before(first + unit_at, units_a_row, gaps, UNIT)
            at += _spread(ahead, UNITS, UNIT)
            # Triton 3.6 does not see this through the reshape, and would store one by one
            at = tl.max_contiguous(tl.multiple_of(at, _ALIGNMENT), _ALIGNMENT)
        tl.store(weights_ptr + first + at, weight, mask=live)


@triton.jit
def _dequantize_8bit_kernel(
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    weights_ptr,
    num_weights,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    units_a_row=None,
    gaps=0,
):
    first = tl.program_id(0).to(tl.int64) * (UNIT * UNITS)
    num_left = tl.minimum(num_weights - first, UNIT * UNITS).to(tl.int32)
    unit_at = tl.arange(0, UNITS) * UNIT
    group = (first + unit_at) // GROUP
    live_unit = unit_at < num_left
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    scale = group_scale(scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, group, live_unit)
    at = unit_at[:, None] + tl.arange(0, UNIT)[None, :]
    live = at < num_left
    weight = tl.load(packed_ptr + first + at, mask=live, other=0).to(tl.float32) - 128.0
    if zeros_ptr is not None:
        weight -= group_zero(zeros_ptr, group, live_unit, 8)[:, None]
    weight = (weight * scale[:, None]).to(weights_ptr.dtype.element_ty)
    if units_a_row is not None:
        at += _gaps_before(first + unit_at, units_a_row, gaps, UNIT)[:, None]
    tl.store(weights_ptr + first + at, weight, mask=live)
