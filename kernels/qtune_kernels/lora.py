"""A quantized linear layer with a LoRA adapter as one op, and its backward as one more.

Between the two autograd keeps x, codes and the R-wide product x A^T. The frozen weight has no
gradient, and x need not have one (the first layer of a model that checkpoints nothing). The
products are in lora_products.py; which of them runs on CUDA is decided in lora_cuda.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtune_kernels import lora_cuda
from qtune_kernels import lora_products as products
from qtune_kernels.lora_products import Weight
from qtune_kernels.scales import Scales


def lora_linear(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """y = x W^T + bias + scaling (x A^T) B^T, [..., O] in the dtype of x [..., I].

    Differentiable in x, bias, a [R, I] and b [O, R], which may be wider than x: they are rounded to
    its dtype for the products. For W's arguments see `dequantize`.
    """
    weight = packed, scale_codes, scale_scales, scale_offset, zeros, levels, group_size
    y: Tensor = lora_linear_forward(x, *weight, out_features, bias, a, b, scaling)[0]
    return y


def dense_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """What `lora_linear` returns, the same bits, of a dense weight [O, I] in the dtype of x."""
    y, _ = products.forward(_rows(x), weight, bias, a, b, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("qtune::lora_linear", mutates_args=())
def lora_linear_forward(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """What `lora_linear` returns, and u = x A^T, [T, R] in the dtype of x, for the backward."""
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (out_features, x.shape[-1]))
    y, u = products.forward(_rows(x), weight.dense(x.dtype), bias, a, b, scaling)
    return y.view(*x.shape[:-1], out_features), u


@lora_linear_forward.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    return x.new_empty(*shape, out_features), x.new_empty(math.prod(shape), a.shape[0])


@lora_linear_forward.register_kernel("cpu")
def _(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import lora as native

    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (out_features, x.shape[-1]))
    if native.takes(x, weight, len(a)):
        y, u = native.forward(_rows(x), weight, bias, a, b, scaling)
    else:
        y, u = products.forward(_rows(x), weight.dense(x.dtype), bias, a, b, scaling)
    return y.view(*x.shape[:-1], out_features), u


@lora_linear_forward.register_kernel("cuda")
def _(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (out_features, x.shape[-1]))
    y, u = lora_cuda.forward(_rows(x), weight, bias, a, b, scaling)
    return y.view(*x.shape[:-1], out_features), u


@torch.library.custom_op("qtune::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., I] in the dtype of dy [..., O], dA [R, I] and dB [O, R] in those of a and b.

    Without `needs_dx`, dx is empty, [0], and the frozen weight is not touched.
    """
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (dy.shape[-1], x.shape[-1]))
    v, da, db = products.adapter_gradients(_rows(dy), _rows(x), u, a, b, scaling)
    if not needs_dx:
        return dy.new_empty(0), da, db
    dx = products.input_gradient(_rows(dy), v, weight.dense(dy.dtype), a)
    return dx.view(x.shape), da, db


@lora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(x.shape if needs_dx else 0)
    return dx, a.new_empty(a.shape), b.new_empty(b.shape)


@lora_linear_backward.register_kernel("cpu")
def _(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from qtune_kernels.cpu import lora as native

    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (dy.shape[-1], x.shape[-1]))
    if native.takes(dy, weight, len(a)):
        dx, da, db = native.backward(_rows(dy), _rows(x), u, weight, a, b, scaling, needs_dx)
        dx = dx.view(x.shape if needs_dx else (0,))
        return dx, da.to(a.dtype), db.to(b.dtype).contiguous()
    v, da, db = products.adapter_gradients(_rows(dy), _rows(x), u, a, b, scaling)
    if not needs_dx:
        return dy.new_empty(0), da, db
    dx = products.input_gradient(_rows(dy), v, weight.dense(dy.dtype), a)
    return dx.view(x.shape), da, db


@lora_linear_backward.register_kernel("cuda")
def _(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    weight = Weight(packed, scales, levels, group_size, (dy.shape[-1], x.shape[-1]))
    v, da, db = products.adapter_gradients(_rows(dy), _rows(x), u, a, b, scaling)
    if not needs_dx:
        return dy.new_empty(0), da, db
    return lora_cuda.input_gradient(_rows(dy), v, weight, a).view(x.shape), da, db


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, levels, group_size, _, _, a, b, scaling = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, a, b, *weight)
    ctx.levels, ctx.group_size, ctx.scaling = levels, group_size, scaling


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, u, a, b, *weight = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    dx, da, db = lora_linear_backward(
        dy, x, u, *weight, ctx.levels, ctx.group_size, a, b, ctx.scaling, needs_dx
    )
    dbias = _rows(dy).sum(0) if ctx.needs_input_grad[9] else None
    return dx if needs_dx else None, *[None] * 8, dbias, da, db, None


lora_linear_forward.register_autograd(_backward, setup_context=_save)
