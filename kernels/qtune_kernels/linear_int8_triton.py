"""The CUDA kernel of `linear_int8`.

The weight is the left operand, y^T = W x^T: its codes lose their offset by an exclusive or in
registers, from where the tensor core takes a left operand, and both operands lie along the sum in
memory, as integer products demand. A step of 64 or 128 columns has one scale a feature, which goes
onto the step's integer sums in float32; where a scale serves whole rows, integers are summed to the
end.

How many outlier columns there are, only the device knows, and asking would make the host wait. So
their numbers are listed on the device, and after its integer loop each program runs a second loop
as long as that list, which gathers those columns of x and of the weight and adds their product in
16 bits. It takes any number of columns and no memory, where a copy of the columns would need room
for the worst case, or a limit. Gathered bytes come one by one: the price is right for the few
outliers of a language model, and with thresholds that pick hundreds `linear` is the better choice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.dequantize_triton import group_scale, load_offset
from qtune_kernels.linear_int8 import STEP
from qtune_kernels.quantize_rows import QuantizedRows
from qtune_kernels.scales import Scales, dynamic_map

# outlier columns that are multiplied at a time
_OUTLIERS = tl.constexpr(16)


class Tile(NamedTuple):
    """How one program is laid out."""

    rows: int
    features: int
    warps: int
    stages: int


# The first entry with at least as many rows serves, the last one also for more. Scales by groups
# keep the sums of a step beside the total, so for them registers end with the entry before it.
TILES = {
    16: Tile(16, 64, warps=4, stages=4),
    64: Tile(64, 64, warps=4, stages=4),
    128: Tile(128, 128, warps=8, stages=3),
    256: Tile(256, 128, warps=8, stages=3),
}


def choose_tile(num_rows: int, whole_rows: bool) -> Tile:
    """The tile for that many rows of x; `whole_rows`: no row of weights has several scales."""
    most = max(TILES) if whole_rows else 128
    return next(tile for rows, tile in TILES.items() if rows >= min(num_rows, most))


def step_columns(width: int, group_size: int) -> int:
    """Columns multiplied at a time, 64 or 128; all of a step's have one scale a feature."""
    return 2 * STEP if width % (2 * STEP) == 0 and group_size % (2 * STEP) == 0 else STEP


def linear(
    rows: Tensor,
    quantized: QuantizedRows,
    packed: Tensor,
    scales: Scales,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    has_outliers: bool,
) -> Tensor:
    """y = x W^T + bias, [T, O] in the dtype of the rows of x [T, I], bf16 or fp16, contiguous.

    I and the group size are multiples of 64; there are no zero points.
    """
    num_rows, width = rows.shape
    whole_rows = group_size % width == 0
    tile = choose_tile(num_rows, whole_rows)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.features)
    y = rows.new_empty(num_rows, out_features)
    columns = num_outliers = None
    if has_outliers:
        columns = torch.nonzero_static(quantized.outliers, size=width)
        num_outliers = quantized.outliers.sum()
    with torch.cuda.device_of(rows):
        _linear_int8_kernel[(num_tiles,)](
            quantized.codes,
            quantized.scales,
            rows,
            columns,
            num_outliers,
            packed,
            *scales[:3],
            dynamic_map(rows.device),
            bias,
            y,
            num_rows,
            out_features,
            width,
            GROUP=group_size,
            WHOLE_ROWS=whole_rows,
            STEP=step_columns(width, group_size),
            BLOCK_M=tile.rows,
            BLOCK_O=tile.features,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return y


@triton.jit
def _integer_sums(
    codes_at,
    packed_at,
    scale_codes_ptr,
    scale_scales_ptr,
    offset,
    scale_map_ptr,
    step,
    num_steps,
    GROUP: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums of products of codes, each times its weight's scale: float32 [features, rows].

    `step` is the number of each feature's first step in the matrix. Integers hold the sums of
    130 000 columns.
    """
    STEPS: tl.constexpr = GROUP // STEP
    KIND: tl.constexpr = tl.int32 if WHOLE_ROWS else tl.float32
    sums = tl.full((BLOCK_O, BLOCK_M), 0, KIND)
    for _ in range(0, num_steps):
        # less 128, in two's complement
        weight = (tl.load(packed_at) ^ 128).to(tl.int8, bitcast=True)
        if WHOLE_ROWS:
            sums = tl.dot(weight, tl.load(codes_at), sums, out_dtype=tl.int32)
        else:
            scale = group_scale(
                scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, step // STEPS, None
            )
            part = tl.dot(weight, tl.load(codes_at), out_dtype=tl.int32)
            sums += part.to(tl.float32) * scale[:, None]
            step += 1
        packed_at += STEP
        codes_at += STEP
    if WHOLE_ROWS:
        scale = group_scale(
            scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, step // STEPS, None
        )
        sums = sums.to(tl.float32) * scale[:, None]
    return sums


@triton.jit
def _add_outliers(
    sums,
    x_ptr,
    row_at,
    columns_ptr,
    num_outliers_ptr,
    packed_ptr,
    feature_at,
    scale_codes_ptr,
    scale_scales_ptr,
    offset,
    scale_map_ptr,
    GROUP: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):
    """`sums` plus the products of the listed columns in 16 bits; `sums` itself with no list."""
    if columns_ptr is not None:
        num_outliers = tl.load(num_outliers_ptr).to(tl.int32)
        for first in tl.range(0, num_outliers, _OUTLIERS, num_stages=1):
            number = first + tl.arange(0, _OUTLIERS)
            live = number < num_outliers
            column = tl.load(columns_ptr + number, mask=live, other=0)
            x = tl.load(x_ptr + row_at + column[:, None], mask=live[:, None], other=0.0)
            weight_at = feature_at + column[None, :]
            group = (feature_at if WHOLE_ROWS else weight_at) // GROUP
            scale = group_scale(
                scale_codes_ptr, scale_scales_ptr, offset, scale_map_ptr, group, None
            )
            code = tl.load(packed_ptr + weight_at).to(tl.float32) - 128.0
            weight = (code * scale).to(x.dtype)
            sums = tl.dot(weight, x, sums)
    return sums


@triton.jit
def _linear_int8_kernel(
    codes_ptr,
    row_scales_ptr,
    x_ptr,
    columns_ptr,
    num_outliers_ptr,
    packed_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    scale_map_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_features,
    num_columns,
    GROUP: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # neighbours in launch order share a tile of weights
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    feature = tl.program_id(0) // row_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows and features beyond the last are the last once more, and never stored
    held_feature = tl.minimum(feature, num_features - 1)
    held_row = tl.minimum(row, num_rows - 1)
    feature_at = held_feature.to(tl.int64)[:, None] * num_columns
    row_at = held_row.to(tl.int64)[None, :] * num_columns
    column = tl.arange(0, STEP)
    num_steps = num_columns // STEP
    offset = load_offset(scale_codes_ptr, scale_offset_ptr)
    sums = _integer_sums(
        codes_ptr + row_at + column[:, None],
        packed_ptr + feature_at + column[None, :],
        scale_codes_ptr,
        scale_scales_ptr,
        offset,
        scale_map_ptr,
        held_feature * num_steps,
        num_steps,
        GROUP,
        WHOLE_ROWS,
        STEP,
        BLOCK_M,
        BLOCK_O,
    )
    sums *= (tl.load(row_scales_ptr + held_row) * (1.0 / 127.0))[None, :]
    sums = _add_outliers(
        sums,
        x_ptr,
        row_at,
        columns_ptr,
        num_outliers_ptr,
        packed_ptr,
        feature_at,
        scale_codes_ptr,
        scale_scales_ptr,
        offset,
        scale_map_ptr,
        GROUP,
        WHOLE_ROWS,
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    # turned around in 16 bits, which takes half the shared memory
    y = tl.trans(sums.to(y_ptr.dtype.element_ty))
    live = (row < num_rows)[:, None] & (feature < num_features)[None, :]
    y_at = row.to(tl.int64)[:, None] * num_features + feature[None, :]
    tl.store(y_ptr + y_at, y, mask=live)
