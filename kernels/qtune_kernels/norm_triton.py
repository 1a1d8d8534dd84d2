"""The CUDA kernels of `rms_norm`, `add_rms_norm` and `rms_norm_dx`: a row is read once.

Whole rows are held in registers, several to a program where they are narrow (norms of heads). Rows
of y may lie farther apart than their width, so that a product may read them together with what is
put in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.layout import as_rows, row_stride

# elements of a tile, where rows are narrower than that
_TILE = 2048
# 16 elements a thread, two loads of 16 bytes; where a warp holds whole rows only 8, since the
# compiler then takes three times as many instructions for two
_WARP_ELEMENTS = 512
_NARROW = 256
_MAX_WARPS = 32


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None
) -> Tensor:
    """The norm of x [..., I], or `out` [T, I] with it written there; rows of `out` may be apart."""
    y = x.new_empty(x.shape) if out is None else out
    _launch_forward(x, None, weight, eps, offset, y, None)
    return y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual (or `out`, as in `rms_norm`) and that sum."""
    y = x.new_empty(x.shape) if out is None else out
    total = x.new_empty(x.shape)
    _launch_forward(x, residual, weight, eps, offset, y, total)
    return y, total


def rms_norm_dx(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    """The gradient of x [..., I] from that of y, plus `added`."""
    width = x.shape[-1]
    dx = x.new_empty(x.shape)
    dy, x, weight = as_rows(dy, width), as_rows(x, width), weight.contiguous()
    added = None if added is None else as_rows(added, width)
    rows, columns, warps = _tile(width)
    with torch.cuda.device_of(x):
        _rms_norm_dx_kernel[(triton.cdiv(len(x), rows),)](
            dy,
            x,
            weight,
            added,
            dx,
            *x.shape,
            dy.stride(0),
            x.stride(0),
            0 if added is None else added.stride(0),
            EPS=eps,
            OFFSET=offset,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    y: Tensor,
    total: Tensor | None,
) -> None:
    width = x.shape[-1]
    x, weight = as_rows(x, width), weight.contiguous()
    residual = None if residual is None else as_rows(residual, width)
    rows, columns, warps = _tile(width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(len(x), rows),)](
            x,
            residual,
            weight,
            y,
            total,
            *x.shape,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            row_stride(y),
            EPS=eps,
            OFFSET=offset,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns, powers of two, that a program holds, and its warps."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    share = _NARROW if columns <= _NARROW else _WARP_ELEMENTS
    return rows, columns, max(1, min(_MAX_WARPS, rows * columns // share))


@triton.jit
def _add(left, right):
    return left + right


@triton.jit
def _add_pairs(left, left_other, right, right_other):
    return left + right, left_other + right_other


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    num_rows,
    width,
    x_stride,
    residual_stride,
    y_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    live = (row < num_rows) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=live, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + column, x, mask=live)
    normal = x.to(tl.float32)
    squares = tl.reduce(normal * normal, 1, _add)
    normal *= tl.rsqrt(squares / width + EPS)[:, None]
    if OFFSET == 0.0:
        normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    y = (normal * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_stride + column, y, mask=live)


@triton.jit
def _rms_norm_dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    added_ptr,
    dx_ptr,
    num_rows,
    width,
    dy_stride,
    x_stride,
    added_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    live = (row < num_rows) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    gradient = dy * weight
    squares, products = tl.reduce((x * x, x * gradient), 1, _add_pairs)
    rstd = tl.rsqrt(squares / width + EPS)
    dx = (gradient - x * (products * rstd * rstd / width)[:, None]) * rstd[:, None]
    if added_ptr is not None:
        dx += tl.load(added_ptr + row * added_stride + column, mask=live, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=live)
