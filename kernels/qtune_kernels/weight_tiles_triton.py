"""How a fused kernel reads its part of the weight: bytes of storage as 16-bit levels and scales.

A row of the weight is cut into tiles, numbered through the matrix, each a run (of 8-bit codes, two
segments). A tile is decoded strip by strip: 64 bytes with two segments (4 bits) or four (2 bits).
With 3 bits a tile has two strips of four segments, and 64 bytes more with the high bits of both. A
strip becomes one [features, 64] tile of weights for each segment, with nothing moved between lanes
and one scale a row.
"""

import triton
import triton.language as tl

from qtune_kernels.dequantize_triton import group_scale
from qtune_kernels.packing import SEGMENT

_SEGMENT = tl.constexpr(SEGMENT)


@triton.jit
def strip_weights(
    packed_ptr,
    tile,
    strip,
    column,
    live,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Unscaled weights, a [features, 64] for each segment of a strip of the tiles number `tile`.

    Where not `live`, they are any weights. `column` counts the bytes of a strip.
    """
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
    weights = ()
    for segment in tl.static_range(SEGMENTS):
        weights += (levels[segment].to(DTYPE, bitcast=True),)  # type: ignore[assignment]
    return weights


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
