"""Gradients of a low-rank update that was rounded into quantized weights.

The product is that of codes, y = x Q^T with Q the levels nearest to W + s B A. The straight-through
estimator (arXiv 1308.3432) takes dQ for the gradient of what was rounded, and then

    dA = s B^T dy^T x        dB = s dy^T (x A^T)        dx = dy Q

so no gradient of the size of the weight is ever made: those of A and B are LoRA's own. dx has no
share of the adapter beside that of the codes, which hold it already.
"""

from typing import Any

import torch
from torch import Tensor

from qtune_kernels import lora_products as products


def straight_through(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y [..., O] as it is, the product of x [..., I] with weights into which s B A was rounded.

    Differentiable in y, a [R, I] and b [O, R]; x has its gradient through y.
    """
    passed: Tensor = _StraightThrough.apply(y, x, a, b, scaling)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling = scaling
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        da, db = adapter_gradients(dy, x, a, b, ctx.scaling)
        return dy, None, da, db, None


@torch.library.custom_op("qtune::adapter_gradients", mutates_args=())
def adapter_gradients(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA [R, I] and dB [O, R], in the dtypes of a and b, of dy [..., O] and x [..., I]."""
    rows = _rows(x)
    _, da, db = products.adapter_gradients(_rows(dy), rows, rows @ a.to(x.dtype).T, a, b, scaling)
    return da, db


@adapter_gradients.register_fake
def _(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


@adapter_gradients.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import lora as native

    rows = _rows(x)
    if native.takes_adapter(rows, a, b):
        da, db = native.adapter_gradients(_rows(dy), rows, a, b, scaling)
        return da.to(a.dtype), db.to(b.dtype).contiguous()
    u = rows @ a.to(x.dtype).T
    _, da, db = products.adapter_gradients(_rows(dy), rows, u, a, b, scaling)
    return da, db


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
