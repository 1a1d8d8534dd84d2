"""How a fused kernel reads its part of the weight: bytes of storage as 16-bit levels and scales.

A row of the weight is cut into tiles, numbered through the matrix, each a run (of 8-bit codes, two
segments). A tile is decoded strip by strip: 64 bytes with two segments (4 bits) or four (2 bits).
With 3 bits a tile has two strips of four segments, and 64 bytes more with the high bits of both. A
strip becomes one [features, 64] tile of weights for each segment, with nothing moved between lanes
and one scale a row.

Zero points are subtracted from the 16-bit numbers, which is exact where they are whole and levels
even. Of those that are not whole, 16ths are subtracted first and then the rest: of levels a 16th
apart, and others with few bits, only the last difference is rounded. In float32 that would cost
three times as much, and tiles of many rows would not fit into the registers of sm_80.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from qtune_kernels.dequantize_triton import group_scale, group_zero
from qtune_kernels.lookup import decoder
from qtune_kernels.packing import SEGMENT, STRIP_SEGMENTS, TILE_SEGMENTS, code_bits

_SEGMENT = tl.constexpr(SEGMENT)
# added to a float32 below it and taken off again, it rounds to the nearest 16th
_ROUNDER = tl.constexpr(786432.0)


@cache
def decoding(levels: tuple[float, ...], dtype: torch.dtype, zeros: bool) -> dict[str, str | float]:
    """What the kernels must know about the codes, by the names of their arguments."""
    bits = code_bits(levels)
    text, unit, base = decoder(levels, dtype, zeros)
    segments = STRIP_SEGMENTS[bits]
    strips = TILE_SEGMENTS[bits] // segments
    layout = {"BITS": bits, "SEGMENTS": segments, "STRIPS": strips}
    return {"LOOKUP": text, "UNIT": unit, "BASE": base, **layout}


@triton.jit
def strip_weights(
    packed_ptr,
    zeros_ptr,
    tile,
    strip,
    column,
    live,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Unscaled weights, a [features, 64] for each segment of a strip of the tiles number `tile`.

    They are in units of UNIT. Where not `live` (None: all are), they are any weights. `column`
    counts the bytes of a strip.
    """
    levels = _strip_levels(packed_ptr, tile, strip, column, live, LOOKUP, BITS, DTYPE)
    STRIPS: tl.constexpr = 2 if BITS == 3 else 1
    weights = ()
    for segment in tl.static_range(SEGMENTS):
        weight = levels[segment].to(DTYPE, bitcast=True)
        if zeros_ptr is not None:
            group = ((tile * STRIPS + strip) * SEGMENTS + segment) // (GROUP // _SEGMENT)
            zero = group_zero(zeros_ptr, group, live, BITS) * (1.0 / UNIT)
            if zeros_ptr.dtype.element_ty.is_floating():
                sixteenths = (zero + _ROUNDER) - _ROUNDER
                weight = _less(_less(weight, sixteenths + BASE), zero - sixteenths)
            else:
                weight = _less(weight, zero + BASE)
        weights += (weight,)  # type: ignore[assignment]
    return weights


@triton.jit
def _less(weights, of_rows):
    """Weights [features, 64] less float32 numbers [features], in 16 bits."""
    return weights - of_rows.to(weights.dtype)[:, None]


@triton.jit
def _strip_levels(
    packed_ptr,
    tile,
    strip,
    column,
    live,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The numbers, in 16 bits, that codes stand for: [features, 64] for each segment."""
    if live is not None:
        live = live[:, None]
    # bytes of a tile: of 8 bits two times 64, of 3 bits three times
    BYTES: tl.constexpr = _SEGMENT * (2 if BITS == 8 else (3 if BITS == 3 else 1))
    packed_at = packed_ptr + tile.to(tl.int64)[:, None] * BYTES + column[None, :]
    if BITS == 8:
        # 128ths, which are exact, and keep the scales clear of the subnormal numbers of float16
        first = tl.load(packed_at, mask=live).to(tl.float32) * (1.0 / 128.0) - 1.0
        second = tl.load(packed_at + _SEGMENT, mask=live).to(tl.float32) * (1.0 / 128.0) - 1.0
        levels = first.to(DTYPE), second.to(DTYPE)
    elif BITS == 4:
        levels = tl.inline_asm_elementwise(
            LOOKUP,
            "=&r,=&r,=&r,=&r,r",
            [tl.load(packed_at, mask=live)],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
    elif BITS == 3:
        # Where the strip is a compile-time constant, all operands are loads and constants, and the
        # compiler decodes in the layout that tensor cores want; else through shared memory.
        levels = tl.inline_asm_elementwise(
            LOOKUP,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
            [
                tl.load(packed_at + strip * _SEGMENT, mask=live),
                tl.load(packed_at + 2 * _SEGMENT, mask=live),
                strip * 4,
            ],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
    else:
        levels = tl.inline_asm_elementwise(
            LOOKUP,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [tl.load(packed_at, mask=live)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
    return levels


@triton.jit
def strip_scales(
    codes_ptr,
    scales_ptr,
    offset,
    map_ptr,
    strip,
    live,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The float32 scales, times UNIT, of the segments of the strips number `strip`."""
    scales = ()
    for segment in tl.static_range(SEGMENTS):
        group = (strip * SEGMENTS + segment) // (GROUP // _SEGMENT)
        scale = group_scale(codes_ptr, scales_ptr, offset, map_ptr, group, live)
        if UNIT != 1.0:
            scale = scale * UNIT
        scales += (scale,)  # type: ignore[assignment]
    return scales
