"""The products of a linear layer with a LoRA adapter, by the matrix kernel with decoding inside.

The adapter is one step more of the sums over the big matrix, so there is no pass over y or dx for
it; its rank is filled up to the 32 products of a step. The gradients of A and B are sums over rows
in float32.
"""

import torch
from torch import Tensor

from qtune_kernels.cpu.product import Extension, Narrow, multiplies, product
from qtune_kernels.cpu.tiles import DEPTH
from qtune_kernels.cpu.transpose import lying
from qtune_kernels.dequantize import Codes


def takes(rows: Tensor, codes: Codes, rank: int) -> bool:
    """Whether `forward` and `backward` can do this layer on this machine."""
    return rank <= DEPTH and multiplies(rows, codes)


def takes_adapter(rows: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `adapter_gradients` can do an adapter with these rows on this machine."""
    return all(multiplies(rows, Narrow(matrix)) for matrix in (a, b))


def forward(
    x: Tensor, codes: Codes, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [T, O] and u = x A^T [T, R], bf16, of rows x [T, I]."""
    u = product(x, _narrow(a), outputs_first=True)
    extension = Extension(u, _narrow(b, scaling))
    y = product(x, codes, outputs_first=True, bias=bias, extension=extension)
    return y, u[:, : a.shape[0]].contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    codes: Codes,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, I] in bf16, dA [R, I] and dB [O, R] in float32; dx is empty if nobody needs it."""
    v = product(dy, _narrow(b, scaling), outputs_first=False)
    dx = dy.new_empty(0)
    if needs_dx:
        dx = product(dy, codes, outputs_first=False, extension=Extension(v, _narrow(a)))
    return dx, *_gradients(dy, x, u, v, a, b, scaling)


def adapter_gradients(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA [R, I] and dB [O, R] in float32 of dy [T, O] and x [T, I]."""
    u = product(x, _narrow(a), outputs_first=True)
    v = product(dy, _narrow(b, scaling), outputs_first=False)
    return _gradients(dy, x, u, v, a, b, scaling)


def _gradients(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    da = _sum_over_rows(v, x)[: a.shape[0]]
    db = torch.empty_like(b, dtype=torch.float32)
    torch.mul(_sum_over_rows(u, dy)[: a.shape[0]].T, scaling, out=db)
    return da, db


def _narrow(matrix: Tensor, factor: float = 1.0) -> Narrow:
    return Narrow(matrix.detach().float().contiguous(), factor)


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, float32 [R or more, N], of bf16 [T, R] and [T, N]."""
    if not multiplies(left, right):
        return (left.T @ right).float()
    return product(lying(left), right, outputs_first=False, dtype=torch.float32)
