"""The products of a linear layer with a LoRA adapter (arXiv 2106.09685), in plain PyTorch.

    y = x W^T + bias + s (x A^T) B^T        u = x A^T, v = s dy B, both [T, R]
    dx = dy W + v A,  dA = v^T x,  dB = s dy^T u

Each way has one product with the big matrix and no pass over y or dx of its own. Where rows have
room behind them, the sum over R is a continuation of the sum over I (or O):

    y = [x, u] [W, s B]^T        dx = [dy, v] [W; A]

Elsewhere the small product comes first, and the big one adds onto it as it stores. The other order
would read and write y once more by itself and round the base's part of it, the larger one. All
operands are in the dtype of x, sums in float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from qtune_kernels.dequantize import Codes
from qtune_kernels.linear import temporary_weight
from qtune_kernels.rows import ALIGNMENT, extended, room_behind


class Weight(Codes):
    """A quantized matrix, and how its products get it."""

    __slots__ = ()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [O, I]; on the CPU in a buffer that the next call overwrites."""
        return temporary_weight(*self, dtype)

    def dequantize_into(self, out: Tensor) -> None:
        """Write the weights into `out` [O, I], whose rows may lie apart."""
        if out.is_cuda:
            from qtune_kernels import dequantize_triton

            if dequantize_triton.reaches(out, self.group_size):
                dequantize_triton.dequantize_into(out, *self[:-1])
                return
        out.copy_(self.dense(out.dtype))


def extends(rows: Tensor, rank: int) -> bool:
    """Whether there is room behind the rows for as many columns, and whether using it pays."""
    aligned = rank % ALIGNMENT == rows.stride(0) % ALIGNMENT == 0
    return aligned and rank <= room_behind(rows)


def scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B [O, R] in `dtype`, rounded once."""
    wider = torch.promote_types(b.dtype, dtype)
    return (b.to(wider) * scaling).to(dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [T, O] and u [T, R] of rows x [T, I] and a dense weight [O, I]."""
    u = x @ a.to(x.dtype).T
    right = scaled(b, scaling, x.dtype).T
    y = u @ right if bias is None else torch.addmm(bias, u, right)
    return y.addmm_(x, weight.T), u


def forward_extended(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [T, O] and u [T, R] of rows x [T, I] with room behind them."""
    out_features, in_features = weight.shape
    u = x @ a.to(x.dtype).T
    wide_x = extended(x, u.shape[1])
    wide_x[:, in_features:] = u
    wide_weight = x.new_empty(out_features, wide_x.shape[1])
    weight.dequantize_into(wide_weight[:, :in_features])
    wide_weight[:, in_features:] = scaled(b, scaling, x.dtype)
    return dense_linear(wide_x, wide_weight, bias), u


def rank_gradient(dy: Tensor, b: Tensor, scaling: float) -> Tensor:
    """v = s dy B [T, R] of dy [T, O]: the gradient that reaches x A^T."""
    return dy @ scaled(b, scaling, dy.dtype)


def input_gradient(dy: Tensor, v: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """dx [T, I] of dy [T, O] and a dense weight [O, I]."""
    return (v @ a.to(dy.dtype)).addmm_(dy, weight)


def input_gradient_extended(dy: Tensor, v: Tensor, weight: Weight, a: Tensor) -> Tensor:
    """dx [T, I] of dy [T, O] with room behind its rows."""
    out_features, in_features = weight.shape
    wide_dy = extended(dy, v.shape[1])
    wide_dy[:, out_features:] = v
    long_weight = dy.new_empty(wide_dy.shape[1], in_features)
    weight.dequantize_into(long_weight[:out_features])
    long_weight[out_features:] = a
    return wide_dy @ long_weight


def adapter_gradients(
    dy: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """v [T, R], and dA [R, I] and dB [O, R] in the dtypes of a and b, of dy [T, O] and x [T, I]."""
    v = rank_gradient(dy, b, scaling)
    return v, a_gradient(v, x, a.dtype), b_gradient(dy, u, scaling, b.dtype)


def a_gradient(v: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dA [R, I] in `dtype`."""
    return _sum_over_rows(v, x, dtype)


def b_gradient(dy: Tensor, u: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """dB [O, R] in `dtype`."""
    return _sum_over_rows(dy, u, dtype).mul_(scaling)


def _sum_over_rows(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right in `dtype`; only CUDA's product of 16-bit numbers can hand out float32 sums.

    Elsewhere these are rounded to 16 bits, which is 2^-9 (bf16) of a gradient: copies of x and dy
    in float32 would take longer than all of the adapter.
    """
    if left.is_cuda and left.itemsize == 2 and dtype == torch.float32:
        return torch.mm(left.T, right, out_dtype=dtype)
    return (left.T @ right).to(dtype)
