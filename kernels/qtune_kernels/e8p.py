"""Matrices in the code book E8P: y = x W^T and dx = dy W, straight from words.

A matrix [O, I] is a word of 16 bits for every eight weights of a row (e8p_book.py), two bytes each,
lower one first, and one scale, float32 [1]. A weight is that times a number of the code book,
rounded once. Autograd keeps words, never a dense matrix. The products take the dequantized matrix
as a temporary: on the CPU one buffer for all layers, filled through a table of all points; the
kernel for CUDA is in e8p_triton.py. No kernel decodes inside the product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from qtune_kernels.e8p_book import LENGTH, STEP, points
from qtune_kernels.scratch import scratch

# words decoded at a time on the CPU: their float32 products stay in the second-level cache
_CHUNK = 1 << 12


@torch.library.custom_op("qtune::e8p_dequantize", mutates_args=())
def e8p_dequantize(
    packed: Tensor, scale: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Weights [O, I] in `dtype` of words, uint8 [O I / 4], and their scale, float32 [1]."""
    weight = packed.new_empty(out_features, in_features, dtype=dtype)
    _dequantize_into(weight.view(-1), packed, scale)
    return weight


@e8p_dequantize.register_fake
def _(
    packed: Tensor, scale: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(out_features, in_features, dtype=dtype)


@e8p_dequantize.register_kernel("cuda")
def _(
    packed: Tensor, scale: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    from qtune_kernels import e8p_triton

    weight = packed.new_empty(out_features, in_features, dtype=dtype)
    e8p_triton.dequantize_into(weight.view(-1), packed, scale)
    return weight


@torch.library.custom_op("qtune::e8p_linear", mutates_args=())
def e8p_linear(x: Tensor, packed: Tensor, scale: Tensor, out_features: int) -> Tensor:
    """y = x W^T, [..., O] in the dtype of x [..., I]; for W's tensors see `e8p_dequantize`."""
    return dense_linear(x, _temporary(packed, scale, out_features, x.shape[-1], x.dtype))


@e8p_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qtune::e8p_linear_dx", mutates_args=())
def e8p_linear_dx(dy: Tensor, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """dx = dy W, [..., I] in the dtype of dy [..., O]."""
    return dy @ _temporary(packed, scale, dy.shape[-1], in_features, dy.dtype)


@e8p_linear_dx.register_fake
def _(dy: Tensor, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], in_features)


def _temporary(
    packed: Tensor, scale: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight [O, I]; on the CPU in a buffer that the next call overwrites."""
    if packed.device.type != "cpu":
        weight: Tensor = e8p_dequantize(packed, scale, out_features, in_features, dtype)
        return weight
    flat = scratch("weight", out_features * in_features, dtype)
    _dequantize_into(flat, packed, scale)
    return flat.view(out_features, in_features)


def _dequantize_into(flat: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Write the weights into `flat`, [O I] of any float dtype."""
    if flat.is_cpu:
        from qtune_kernels.cpu import e8p as native

        if native.dequantizes(flat):
            native.dequantize_into(flat, packed, scale)
            return
    words = packed.view(torch.int16)
    table = points(packed.device)
    step = scale.to(torch.promote_types(flat.dtype, torch.float32)) * STEP
    out = flat.view(-1, LENGTH)
    for at in range(0, len(words), _CHUNK):
        # a negative number counts from the end of the table, just as the unsigned word does
        found = table[words[at : at + _CHUNK].long()].view(torch.int8)
        out[at : at + _CHUNK] = (found * step).view(-1, LENGTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.in_features = x.shape[-1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = None
    if ctx.needs_input_grad[0]:
        dx = e8p_linear_dx(dy, *ctx.saved_tensors, ctx.in_features)
    return dx, None, None, None


e8p_linear.register_autograd(_backward, setup_context=_save)
