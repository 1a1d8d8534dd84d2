"""The CUDA kernels of `quantize_rows`: one marks outlier columns, one writes scales and codes.

Rows are read twice, and the second kernel's own second pass comes from the first-level cache.
Rounding is that of the plain version, so products and sums stay apart (`enable_fp_fusion=False`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.quantize_rows import NOTHING, QuantizedRows

_NOTHING = tl.constexpr(NOTHING)
# added to a float32 up to 2^22 in magnitude, it leaves the nearest integer in the lowest bits
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
# the tile that a program searches, and the columns of a row that one quantizes at a time
SEARCH_ROWS, SEARCH_COLUMNS = 64, 128
ROW_BLOCK = 4096


def quantize_rows(x: Tensor, threshold: float) -> QuantizedRows:
    """The rows of x [T, I] in 8 bits; there are no outliers with a threshold of 0."""
    rows = x.contiguous()
    outliers = rows.new_zeros(rows.shape[1], dtype=torch.bool)
    codes = torch.empty_like(rows, dtype=torch.int8)
    scales = rows.new_empty(rows.shape[0], dtype=torch.float32)
    block = min(triton.next_power_of_2(rows.shape[1]), ROW_BLOCK)
    tiles = triton.cdiv(rows.shape[1], SEARCH_COLUMNS), triton.cdiv(rows.shape[0], SEARCH_ROWS)
    with torch.cuda.device_of(rows):
        if threshold:
            _find_outliers_kernel[tiles](
                rows,
                outliers.view(torch.uint8),
                *rows.shape,
                threshold,
                ROWS=SEARCH_ROWS,
                COLUMNS=SEARCH_COLUMNS,
            )
        _quantize_rows_kernel[(rows.shape[0],)](
            rows,
            outliers.view(torch.uint8) if threshold else None,
            codes,
            scales,
            rows.shape[1],
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return QuantizedRows(codes, scales, outliers)


@triton.jit
def _find_outliers_kernel(
    x_ptr,
    outliers_ptr,
    num_rows,
    num_columns,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    live = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    # programs may mark the same column: they write the same byte
    mark_at = outliers_ptr + tl.broadcast_to(column[None, :], [ROWS, COLUMNS])
    tl.store(mark_at, tl.full((ROWS, COLUMNS), 1, tl.uint8), mask=tl.abs(x) > threshold)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_block(row_ptr, outliers_ptr, column, num_columns):
    """A block of a row in float32, zero in outlier columns and beyond the end."""
    live = column < num_columns
    x = tl.load(row_ptr + column, mask=live, other=0.0).to(tl.float32)
    if outliers_ptr is not None:
        # a mask of the load instead would make it one of single elements
        x = tl.where(tl.load(outliers_ptr + column, mask=live, other=0) == 0, x, 0.0)
    return x


@triton.jit
def _quantize_rows_kernel(
    x_ptr, outliers_ptr, codes_ptr, scales_ptr, num_columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * num_columns
    largest = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, num_columns, BLOCK):
        x = _row_block(row_ptr, outliers_ptr, first + tl.arange(0, BLOCK), num_columns)
        largest = _larger(largest, tl.abs(x))
    scale = tl.reduce(largest, 0, _larger)
    tl.store(scales_ptr + row, scale)
    reciprocal = tl.div_rn(1.0, tl.maximum(scale, _NOTHING))
    step = tl.where(scale > _NOTHING, reciprocal * 127.0, 0.0)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _row_block(row_ptr, outliers_ptr, column, num_columns)
        code = (x * step + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(codes_ptr + row * num_columns + column, code, mask=column < num_columns)
