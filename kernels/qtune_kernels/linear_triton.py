"""The fused CUDA kernels of `linear` and `linear_dx`: the weight is decoded inside the product.

The weight is read by weight_tiles_triton.py, which makes [features, 64] of it at a time. Where one
wave of programs would leave multiprocessors idle, the sum is split into parts that a second kernel
adds in a fixed order: no atomics, so results repeat bit for bit. Out-of-range rows of tiles are
clamped to the last one where that only feeds results that are never stored.

Kernels call built-in functions of `triton.language` only (`tl.full`, not `tl.zeros`): the others
are kernels themselves, compiled or interpreted according to how Triton was imported, which the
tests cannot rely on.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.dequantize_triton import load_offset
from qtune_kernels.linear_tiles import Tile, num_parts
from qtune_kernels.lora_triton import Adapter, adapter_arguments, narrow_product
from qtune_kernels.packing import SEGMENT, STRIP_SEGMENTS, TILE_SEGMENTS, code_bits
from qtune_kernels.partial_sums_triton import add_parts, partial_sums, store_sums
from qtune_kernels.scales import Scales, dynamic_map
from qtune_kernels.weight_tiles_triton import decoding, strip_scales, strip_weights

_SEGMENT = tl.constexpr(SEGMENT)


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Scales,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    tile: Tile,
    adapter: Adapter | None = None,
) -> Tensor:
    """y = x W^T + bias, [..., O] in the dtype of x [..., I], bf16 or fp16; I whole tiles.

    With an adapter, plus scaling u B^T.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bits = code_bits(levels)
    num_steps = rows.shape[1] // (TILE_SEGMENTS[bits] * SEGMENT)
    num_tiles = triton.cdiv(rows.shape[0], tile.rows) * triton.cdiv(out_features, tile.features)
    parts = num_parts(num_tiles, num_steps, rows.device)
    y = rows.new_empty(rows.shape[0], out_features)
    with torch.cuda.device_of(rows):
        sums = partial_sums(y, parts)
        (_few_rows_kernel if tile.few_rows else _many_rows_kernel)[(num_tiles, parts)](
            rows,
            packed,
            *scales,
            dynamic_map(rows.device),
            bias if parts == 1 else None,
            sums,
            *y.shape,
            num_steps,
            triton.cdiv(num_steps, parts),
            **decoding(tuple(levels), rows.dtype, scales.zeros is not None),
            GROUP=group_size,
            BLOCK_M=tile.rows,
            BLOCK_O=tile.features,
            **adapter_arguments(adapter),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        add_parts(sums, bias, y)
    return y.view(*x.shape[:-1], out_features)


def linear_dx(
    dy: Tensor,
    packed: Tensor,
    scales: Scales,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
    tile: Tile,
    adapter: Adapter | None = None,
) -> Tensor:
    """dx = dy W, [..., I] in the dtype of dy [..., O], bf16 or fp16; I whole tiles.

    With an adapter, plus scaling v A.
    """
    rows = dy.reshape(-1, dy.shape[-1]).contiguous()
    bits = code_bits(levels)
    num_strips = in_features // (STRIP_SEGMENTS[bits] * SEGMENT)
    num_tiles = triton.cdiv(rows.shape[0], tile.rows) * num_strips
    num_steps = triton.cdiv(rows.shape[1], tile.features)
    parts = num_parts(num_tiles, num_steps, rows.device)
    dx = rows.new_empty(rows.shape[0], in_features)
    with torch.cuda.device_of(rows):
        sums = partial_sums(dx, parts)
        _dx_kernel[(num_tiles, parts)](
            rows,
            packed,
            *scales,
            dynamic_map(rows.device),
            sums,
            *rows.shape,
            in_features // (TILE_SEGMENTS[bits] * SEGMENT),
            triton.cdiv(num_steps, parts),
            **decoding(tuple(levels), rows.dtype, scales.zeros is not None),
            GROUP=group_size,
            BLOCK_M=tile.rows,
            BLOCK_O=tile.features,
            **adapter_arguments(adapter),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        add_parts(sums, None, dx)
    return dx.view(*dy.shape[:-1], in_features)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    num_features,
    row_tiles,
    tiles_a_part,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    narrow_ptr=None,
    matrix_ptr=None,
    scaling=1.0,
    RANK: tl.constexpr = 0,
    UNIT: tl.constexpr = 1.0,
    BASE: tl.constexpr = 0.0,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = STRIPS * SEGMENTS * _SEGMENT
    feature = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, _SEGMENT)
    first = tl.program_id(1) * tiles_a_part
    last = tl.minimum(first + tiles_a_part, row_tiles)

    held_feature = tl.minimum(feature, num_features - 1)
    held_row = tl.minimum(row, num_rows - 1)
    x_at = x_ptr + first * COLUMNS + held_row[None, :] * (row_tiles * COLUMNS) + column[:, None]
    first_tile = held_feature * row_tiles
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    sums = narrow_product(
        matrix_ptr, held_feature, narrow_ptr, held_row, 1, RANK, scaling, RANK, DTYPE
    )
    for step in range(first, last):
        tile = first_tile + step
        for strip in tl.static_range(STRIPS):
            number = tile * STRIPS + strip
            scales = strip_scales(
                scale_codes_ptr,
                scale_scales_ptr,
                offset,
                scale_map_ptr,
                number,
                None,
                SEGMENTS,
                GROUP,
                UNIT,
            )
            weights = strip_weights(
                packed_ptr,
                zeros_ptr,
                tile,
                strip,
                column,
                None,
                LOOKUP,
                BITS,
                SEGMENTS,
                GROUP,
                UNIT,
                BASE,
                DTYPE,
            )
            for segment in tl.static_range(SEGMENTS):
                x = tl.load(x_at + (strip * SEGMENTS + segment) * _SEGMENT)
                sums += tl.dot(weights[segment], x) * scales[segment][:, None]
        x_at += COLUMNS
    sums = tl.trans(sums)
    store_sums(sums_ptr, bias_ptr, sums, row[:, None], feature[None, :], num_rows, num_features)


@triton.jit
def _many_rows_kernel(
    x_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    num_features,
    row_tiles,
    tiles_a_part,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    narrow_ptr=None,
    matrix_ptr=None,
    scaling=1.0,
    RANK: tl.constexpr = 0,
    UNIT: tl.constexpr = 1.0,
    BASE: tl.constexpr = 0.0,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = STRIPS * SEGMENTS * _SEGMENT
    # neighbours in launch order share a tile of weights, which is the larger operand
    num_blocks = (num_rows + BLOCK_M - 1) // BLOCK_M
    feature = tl.program_id(0) // num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, _SEGMENT)
    first = tl.program_id(1) * tiles_a_part
    last = tl.minimum(first + tiles_a_part, row_tiles)

    held_feature = tl.minimum(feature, num_features - 1)
    held_row = tl.minimum(row, num_rows - 1)
    x_at = x_ptr + first * COLUMNS + held_row[:, None] * (row_tiles * COLUMNS) + column[None, :]
    first_tile = held_feature * row_tiles
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    sums = narrow_product(
        narrow_ptr, held_row, matrix_ptr, held_feature, 1, RANK, scaling, RANK, DTYPE
    )
    for step in range(first * STRIPS, last * STRIPS):
        number = first_tile * STRIPS + step
        scales = strip_scales(
            scale_codes_ptr,
            scale_scales_ptr,
            offset,
            scale_map_ptr,
            number,
            None,
            SEGMENTS,
            GROUP,
            UNIT,
        )
        tile, strip = first_tile + step // STRIPS, step % STRIPS
        weights = strip_weights(
            packed_ptr,
            zeros_ptr,
            tile,
            strip,
            column,
            None,
            LOOKUP,
            BITS,
            SEGMENTS,
            GROUP,
            UNIT,
            BASE,
            DTYPE,
        )
        for segment in tl.static_range(SEGMENTS):
            weight = weights[segment] * scales[segment].to(DTYPE)[:, None]
            sums = tl.dot(tl.load(x_at + segment * _SEGMENT), tl.trans(weight), sums)
        x_at += SEGMENTS * _SEGMENT
    store_sums(sums_ptr, bias_ptr, sums, row[:, None], feature[None, :], num_rows, num_features)


@triton.jit
def _dx_kernel(
    dy_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    zeros_ptr,
    scale_map_ptr,
    sums_ptr,
    num_rows,
    num_features,
    row_tiles,
    steps_a_part,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    narrow_ptr=None,
    matrix_ptr=None,
    scaling=1.0,
    RANK: tl.constexpr = 0,
    UNIT: tl.constexpr = 1.0,
    BASE: tl.constexpr = 0.0,
):
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    num_blocks = (num_rows + BLOCK_M - 1) // BLOCK_M
    column_strip = tl.program_id(0) // num_blocks
    row = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, _SEGMENT)
    first = tl.program_id(1) * steps_a_part * BLOCK_O
    last = tl.minimum(first + steps_a_part * BLOCK_O, num_features)

    feature = first + tl.arange(0, BLOCK_O)
    held_row = tl.minimum(row, num_rows - 1)
    dy_at = dy_ptr + held_row[:, None] * num_features + feature[None, :]
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    sums = ()
    width = row_tiles * (STRIPS * SEGMENTS * _SEGMENT)
    for segment in tl.static_range(SEGMENTS):
        own = (column_strip * SEGMENTS + segment) * _SEGMENT + column
        start = narrow_product(
            narrow_ptr, held_row, matrix_ptr, own, width, 1, scaling, RANK, DTYPE
        )
        sums += (start,)  # type: ignore[assignment]
    for _ in range(first, last, BLOCK_O):
        live = feature < num_features
        tile = feature * row_tiles + column_strip // STRIPS
        number = feature * (row_tiles * STRIPS) + column_strip
        scales = strip_scales(
            scale_codes_ptr,
            scale_scales_ptr,
            offset,
            scale_map_ptr,
            number,
            live,
            SEGMENTS,
            GROUP,
            UNIT,
        )
        weights = strip_weights(
            packed_ptr,
            zeros_ptr,
            tile,
            column_strip % STRIPS,
            column,
            live,
            LOOKUP,
            BITS,
            SEGMENTS,
            GROUP,
            UNIT,
            BASE,
            DTYPE,
        )
        # the gradient is zero where a feature does not exist, so the weight there may be anything
        dy = tl.load(dy_at, mask=live[None, :], other=0.0)
        grown = ()
        for segment in tl.static_range(SEGMENTS):
            weight = weights[segment] * scales[segment].to(DTYPE)[:, None]
            grown += (tl.dot(dy, weight, sums[segment]),)  # type: ignore[assignment]
        sums = grown
        feature += BLOCK_O
        dy_at += BLOCK_O
    for segment in tl.static_range(SEGMENTS):
        own = (column_strip * SEGMENTS + segment) * _SEGMENT + column[None, :]
        store_sums(sums_ptr, None, sums[segment], row[:, None], own, num_rows, width)
