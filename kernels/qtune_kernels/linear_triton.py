"""The fused CUDA kernels of `linear` and `linear_dx`: the weight is decoded inside the product.

A run of 128 columns is one [features, 64] tile of bytes that becomes two tiles of weights, one for
each nibble plane, with one scale a row. Where one wave of programs would leave multiprocessors
idle, the sum is split into parts that a second kernel adds in a fixed order: no atomics, so
results repeat bit for bit. Out-of-range rows of tiles are clamped to the last one where that only
feeds results that are never stored.

Kernels call built-in functions of `triton.language` only (`tl.full`, not `tl.zeros`): the others
are kernels themselves, compiled or interpreted according to how Triton was imported, which the
tests cannot rely on.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.dequantize_triton import group_scale
from qtune_kernels.linear_tiles import Tile, num_parts
from qtune_kernels.lookup import lookup_ptx
from qtune_kernels.packing import RUN
from qtune_kernels.scales import Scales, dynamic_map

_RUN = tl.constexpr(RUN)
_HALF = tl.constexpr(RUN // 2)
_SUM_BLOCK = 1024


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Scales,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    tile: Tile,
) -> Tensor:
    """y = x W^T + bias, [..., O] in the dtype of x [..., I], bf16 or fp16; I a multiple of 128."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_runs = rows.shape[1] // RUN
    num_tiles = triton.cdiv(rows.shape[0], tile.rows) * triton.cdiv(out_features, tile.features)
    parts = num_parts(num_tiles, num_runs)
    y = rows.new_empty(rows.shape[0], out_features)
    with torch.cuda.device_of(rows):
        sums = _partial_sums(y, parts)
        (_few_rows_kernel if tile.few_rows else _many_rows_kernel)[(num_tiles, parts)](
            rows,
            packed,
            *scales,
            dynamic_map(rows.device),
            bias if parts == 1 else None,
            sums,
            *y.shape,
            num_runs,
            triton.cdiv(num_runs, parts),
            LOOKUP=_lookup(tuple(levels), rows.dtype),
            GROUP=group_size,
            BLOCK_M=tile.rows,
            BLOCK_O=tile.features,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        _add_parts(sums, bias, y)
    return y.view(*x.shape[:-1], out_features)


def linear_dx(
    dy: Tensor,
    packed: Tensor,
    scales: Scales,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
    tile: Tile,
) -> Tensor:
    """dx = dy W, [..., I] in the dtype of dy [..., O], bf16 or fp16; I a multiple of 128."""
    rows = dy.reshape(-1, dy.shape[-1]).contiguous()
    num_runs = in_features // RUN
    num_tiles = triton.cdiv(rows.shape[0], tile.rows) * num_runs
    num_steps = triton.cdiv(rows.shape[1], tile.features)
    parts = num_parts(num_tiles, num_steps)
    dx = rows.new_empty(rows.shape[0], in_features)
    with torch.cuda.device_of(rows):
        sums = _partial_sums(dx, parts)
        _dx_kernel[(num_tiles, parts)](
            rows,
            packed,
            *scales,
            dynamic_map(rows.device),
            sums,
            *rows.shape,
            num_runs,
            triton.cdiv(num_steps, parts),
            LOOKUP=_lookup(tuple(levels), rows.dtype),
            GROUP=group_size,
            BLOCK_M=tile.rows,
            BLOCK_O=tile.features,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        _add_parts(sums, None, dx)
    return dx.view(*dy.shape[:-1], in_features)


@cache
def _lookup(levels: tuple[float, ...], dtype: torch.dtype) -> str:
    """The look-up's text; empty for 8-bit codes."""
    return lookup_ptx(levels, dtype) if levels else ""


def _partial_sums(out: Tensor, parts: int) -> Tensor:
    """Where the kernel writes: float32 [parts, *out.shape], or `out` itself for one part."""
    return out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)


def _add_parts(sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum over parts, plus the bias, into `out`, unless the kernel has done so."""
    if sums is not out:
        grid = (triton.cdiv(out.numel(), _SUM_BLOCK),)
        _add_parts_kernel[grid](
            sums, bias, out, out.numel(), out.shape[1], PARTS=sums.shape[0], BLOCK=_SUM_BLOCK
        )


@triton.jit
def _weight_tiles(packed_at, live, LOOKUP: tl.constexpr, DTYPE: tl.constexpr):
    """Both planes of a [features, 128] tile of weights, unscaled; where not `live`, any weights."""
    if LOOKUP == "":
        low = tl.load(packed_at, mask=live)
        high = tl.load(packed_at + _HALF, mask=live)
        # 128ths, which are exact, and keep the scales clear of the subnormal numbers of float16
        low = (low.to(tl.float32) * (1.0 / 128.0) - 1.0).to(DTYPE)
        high = (high.to(tl.float32) * (1.0 / 128.0) - 1.0).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            LOOKUP,
            "=&r,=&r,=&r,=&r,r",
            [tl.load(packed_at, mask=live)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            LOOKUP,
            "=&r,=&r,=&r,=&r,r",
            [tl.load(packed_at, mask=live)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _tile_scales(
    codes_ptr, scales_ptr, offset, map_ptr, plane, live, LOOKUP: tl.constexpr, GROUP: tl.constexpr
):
    """The float32 scales of the two planes, the first of which is number `plane` in the matrix."""
    PLANES: tl.constexpr = GROUP // _HALF
    low = group_scale(codes_ptr, scales_ptr, offset, map_ptr, plane // PLANES, live)
    high = group_scale(codes_ptr, scales_ptr, offset, map_ptr, (plane + 1) // PLANES, live)
    if LOOKUP == "":
        low = low * (128.0 / 127.0)
        high = high * (128.0 / 127.0)
    return low, high


@triton.jit
def _store_sums(sums_ptr, bias_ptr, sums, row, feature, num_rows, num_features):
    """Store a [rows, features] tile of this part's sums, with the bias where there is one."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0)
        sums += bias.to(tl.float32)
    part_at = tl.program_id(1).to(tl.int64) * num_rows * num_features
    at = row.to(tl.int64) * num_features + feature
    live = (row < num_rows) & (feature < num_features)
    tl.store(sums_ptr + part_at + at, sums.to(sums_ptr.dtype.element_ty), mask=live)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    num_features,
    num_runs,
    runs_a_part,
    LOOKUP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    RUN_BYTES: tl.constexpr = _RUN if LOOKUP == "" else _HALF
    feature = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, _HALF)
    first = tl.program_id(1) * runs_a_part
    last = tl.minimum(first + runs_a_part, num_runs)

    held_feature = tl.minimum(feature, num_features - 1)
    held_row = tl.minimum(row, num_rows - 1)
    x_at = x_ptr + first * _RUN + held_row[None, :] * (num_runs * _RUN) + column[:, None]
    row_at = held_feature.to(tl.int64) * (num_runs * RUN_BYTES)
    packed_at = packed_ptr + first * RUN_BYTES + row_at[:, None] + column[None, :]
    plane = (held_feature * num_runs + first) * 2
    offset = tl.load(scale_offset_ptr)
    sums = tl.full((BLOCK_O, BLOCK_M), 0.0, tl.float32)
    for _ in range(first, last):
        low_scale, high_scale = _tile_scales(
            scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, plane, None, LOOKUP, GROUP
        )
        low, high = _weight_tiles(packed_at, None, LOOKUP, DTYPE)
        sums += tl.dot(low, tl.load(x_at)) * low_scale[:, None]
        sums += tl.dot(high, tl.load(x_at + _HALF)) * high_scale[:, None]
        x_at += _RUN
        packed_at += RUN_BYTES
        plane += 2
    sums = tl.trans(sums)
    _store_sums(sums_ptr, bias_ptr, sums, row[:, None], feature[None, :], num_rows, num_features)


@triton.jit
def _many_rows_kernel(
    x_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    num_features,
    num_runs,
    runs_a_part,
    LOOKUP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    RUN_BYTES: tl.constexpr = _RUN if LOOKUP == "" else _HALF
    # neighbours in launch order share a tile of weights, which is the larger operand
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    feature = tl.program_id(0) // row_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, _HALF)
    first = tl.program_id(1) * runs_a_part
    last = tl.minimum(first + runs_a_part, num_runs)

    held_feature = tl.minimum(feature, num_features - 1)
    held_row = tl.minimum(row, num_rows - 1)
    x_at = x_ptr + first * _RUN + held_row[:, None] * (num_runs * _RUN) + column[None, :]
    row_at = held_feature.to(tl.int64) * (num_runs * RUN_BYTES)
    packed_at = packed_ptr + first * RUN_BYTES + row_at[:, None] + column[None, :]
    plane = (held_feature * num_runs + first) * 2
    offset = tl.load(scale_offset_ptr)
    sums = tl.full((BLOCK_M, BLOCK_O), 0.0, tl.float32)
    for _ in range(first, last):
        low_scale, high_scale = _tile_scales(
            scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, plane, None, LOOKUP, GROUP
        )
        low, high = _weight_tiles(packed_at, None, LOOKUP, DTYPE)
        low = low * low_scale.to(DTYPE)[:, None]
        high = high * high_scale.to(DTYPE)[:, None]
        sums = tl.dot(tl.load(x_at), tl.trans(low), sums)
        sums = tl.dot(tl.load(x_at + _HALF), tl.trans(high), sums)
        x_at += _RUN
        packed_at += RUN_BYTES
        plane += 2
    _store_sums(sums_ptr, bias_ptr, sums, row[:, None], feature[None, :], num_rows, num_features)


@triton.jit
def _dx_kernel(
    dy_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    sums_ptr,
    num_rows,
    num_features,
    num_runs,
    steps_a_part,
    LOOKUP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    RUN_BYTES: tl.constexpr = _RUN if LOOKUP == "" else _HALF
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    run = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, _HALF)
    first = tl.program_id(1) * steps_a_part * BLOCK_O
    last = tl.minimum(first + steps_a_part * BLOCK_O, num_features)

    feature = first + tl.arange(0, BLOCK_O)
    held_row = tl.minimum(row, num_rows - 1)
    dy_at = dy_ptr + held_row[:, None] * num_features + feature[None, :]
    row_at = feature.to(tl.int64) * (num_runs * RUN_BYTES)
    packed_at = packed_ptr + run * RUN_BYTES + row_at[:, None] + column[None, :]
    offset = tl.load(scale_offset_ptr)
    low_sums = tl.full((BLOCK_M, _HALF), 0.0, tl.float32)
    high_sums = tl.full((BLOCK_M, _HALF), 0.0, tl.float32)
    for _ in range(first, last, BLOCK_O):
        live = feature < num_features
        low_scale, high_scale = _tile_scales(
            scale_codes_ptr,
            scale_scales_ptr,
            offset,
            scale_map_ptr,
            (feature * num_runs + run) * 2,
            live,
            LOOKUP,
            GROUP,
        )
        low, high = _weight_tiles(packed_at, live[:, None], LOOKUP, DTYPE)
        # the gradient is zero where a feature does not exist, so the weight there may be anything
        dy = tl.load(dy_at, mask=live[None, :], other=0.0)
        low_sums = tl.dot(dy, low * low_scale.to(DTYPE)[:, None], low_sums)
        high_sums = tl.dot(dy, high * high_scale.to(DTYPE)[:, None], high_sums)
        feature += BLOCK_O
        dy_at += BLOCK_O
        packed_at += BLOCK_O * num_runs * RUN_BYTES
    low_column = run * _RUN + column[None, :]
    width = num_runs * _RUN
    _store_sums(sums_ptr, None, low_sums, row[:, None], low_column, num_rows, width)
    _store_sums(sums_ptr, None, high_sums, row[:, None], low_column + _HALF, num_rows, width)


@triton.jit
def _add_parts_kernel(
    sums_ptr, bias_ptr, out_ptr, num_outputs, num_features, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_outputs
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums_ptr + part * num_outputs + at, mask=live, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % num_features, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=live)
