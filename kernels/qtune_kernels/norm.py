"""RMSNorm (arXiv 1910.07467), by itself and of a residual sum, with its gradients.

Statistics are float32, as in transformers: there Llama's norm rounds the normalized x to its own
dtype before the weight is multiplied, and Gemma's (`offset` 1: the weight is stored less one)
multiplies in float32. Autograd keeps x only. The backward pass reads the whole row anyway, so
finding the root mean square again costs less than keeping it. The weight, mostly frozen, has its
gradient from plain PyTorch where it wants one.

`room` elements are left free behind each row of y for the product that reads it (rows.py).
"""

from typing import Any

import torch
from torch import Tensor

from qtune_kernels.rows import empty_rows


@torch.library.custom_op("qtune::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0) -> Tensor:
    """y = x / rms(x) * (weight + offset), [..., I] in the dtype of x [..., I]; weight [I]."""
    return _rms_norm(x, weight, eps, offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0) -> Tensor:
    return empty_rows(x, room)


@rms_norm.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0) -> Tensor:
    from qtune_kernels.cpu import norm, rowwise

    run = norm.rms_norm if rowwise.takes(x, weight) else _rms_norm
    return run(x, weight, eps, offset)


@rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0) -> Tensor:
    from qtune_kernels import norm_triton

    return norm_triton.rms_norm(x, weight, eps, offset, empty_rows(x, room))


@torch.library.custom_op("qtune::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual and that sum, both [..., I] in the dtype of x; see `rms_norm`."""
    return _add_rms_norm(x, residual, weight, eps, offset)


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor]:
    return empty_rows(x, room), x.new_empty(x.shape)


@add_rms_norm.register_kernel("cpu")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import norm, rowwise

    run = norm.add_rms_norm if rowwise.takes(x, residual, weight) else _add_rms_norm
    return run(x, residual, weight, eps, offset)


@add_rms_norm.register_kernel("cuda")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor]:
    from qtune_kernels import norm_triton

    return norm_triton.add_rms_norm(x, residual, weight, eps, offset, empty_rows(x, room))


@torch.library.custom_op("qtune::rms_norm_dx", mutates_args=())
def rms_norm_dx(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    """The gradient of x [..., I] from that of y, plus `added`, what reaches x by another way."""
    return _rms_norm_dx(dy, x, weight, eps, offset, added)


@rms_norm_dx.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


@rms_norm_dx.register_kernel("cpu")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    from qtune_kernels.cpu import norm, rowwise

    run = norm.rms_norm_dx if rowwise.takes(dy, x, weight, added) else _rms_norm_dx
    return run(dy, x, weight, eps, offset, added)


@rms_norm_dx.register_kernel("cuda")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    from qtune_kernels import norm_triton

    return norm_triton.rms_norm_dx(dy, x, weight, eps, offset, added)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    normal = x.float() * _reciprocal_rms(x, eps)
    if offset == 0:
        return (normal.to(x.dtype) * weight).to(x.dtype).contiguous()
    return (normal * (weight.float() + offset)).to(x.dtype).contiguous()


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    total = (x + residual).to(x.dtype).contiguous()
    return _rms_norm(total, weight, eps, offset), total


def _rms_norm_dx(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None
) -> Tensor:
    rstd = _reciprocal_rms(x, eps)
    normal = x.float() * rstd
    gradient = dy.float() * (weight.float() + offset)
    dx = (gradient - normal * (gradient * normal).mean(-1, keepdim=True)) * rstd
    if added is not None:
        dx += added
    return dx.to(x.dtype).contiguous()


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """Float32 [..., 1]."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # arguments left at their defaults have no entry
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    return *_gradients(ctx, dy, None, needs_dx, needs_dw), None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_sum(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, needs_dw = ctx.needs_input_grad[:3]
    dx, dw = _gradients(ctx, dy, dsum, needs_x or needs_residual, needs_dw)
    return dx, dx, dw, None, None, None


def _gradients(
    ctx: Any, dy: Tensor, added: Tensor | None, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dx = rms_norm_dx(dy, x, weight, ctx.eps, ctx.offset, added) if needs_dx else None
    dw = None
    if needs_dw:
        per_row = dy.float() * x.float() * _reciprocal_rms(x, ctx.eps)
        dw = per_row.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dw


rms_norm.register_autograd(_backward, setup_context=_save)
add_rms_norm.register_autograd(_backward_sum, setup_context=_save_sum)
