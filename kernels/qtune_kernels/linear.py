"""y = x W^T and dx = dy W, straight from codes.

Autograd keeps the codes, never a dequantized matrix, and there is no gradient for the frozen
weight. On a CPU with AMX the weight is decoded into the cache within the product (cpu/product.py).
Elsewhere on the CPU, and on CUDA for many rows, it is dequantized into a temporary and multiplied
by the vendor's GEMM; on the CPU that temporary is one buffer for all layers. For few rows on CUDA
the kernels of linear_triton.py decode the weight inside the product; linear_tiles.py decides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from qtune_kernels.dequantize import (
    Codes,
    dequantize,
    dequantize_into,
    stored_weights,
)
from qtune_kernels.linear_tiles import backward_tile, forward_tile
from qtune_kernels.packing import code_bits
from qtune_kernels.scales import Scales
from qtune_kernels.scratch import scratch


@torch.library.custom_op("qtune::linear", mutates_args=())
def linear(
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
) -> Tensor:
    """y = x W^T + bias, [..., O] in the dtype of x [..., I]; for W's arguments see `dequantize`."""
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (out_features, x.shape[-1])
    weight = temporary_weight(packed, scales, levels, group_size, shape, x.dtype)
    return dense_linear(x, weight, bias)


@linear.register_fake
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
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@linear.register_kernel("cpu")
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
) -> Tensor:
    from qtune_kernels.cpu.product import multiplies, product

    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (out_features, x.shape[-1])
    codes = Codes(packed, scales, levels, group_size, shape)
    if multiplies(x, codes):
        rows = product(x.reshape(-1, shape[1]), codes, outputs_first=True, bias=bias)
        return rows.view(*x.shape[:-1], out_features)
    weight = temporary_weight(packed, scales, levels, group_size, shape, x.dtype)
    return dense_linear(x, weight, bias)


@linear.register_kernel("cuda")
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
) -> Tensor:
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (out_features, x.shape[-1])
    bits = code_bits(levels)
    tile = forward_tile(x.numel() // shape[1], shape, x.dtype, group_size, bits, x.device)
    if tile is None:
        weight = temporary_weight(packed, scales, levels, group_size, shape, x.dtype)
        return dense_linear(x, weight, bias)
    from qtune_kernels import linear_triton

    return linear_triton.linear(x, packed, scales, levels, group_size, out_features, bias, tile)


@torch.library.custom_op("qtune::linear_dx", mutates_args=())
def linear_dx(
    dy: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
) -> Tensor:
    """dx = dy W, [..., I] in the dtype of dy [..., O]."""
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (dy.shape[-1], in_features)
    return dy @ temporary_weight(packed, scales, levels, group_size, shape, dy.dtype)


@linear_dx.register_fake
def _(
    dy: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], in_features)


@linear_dx.register_kernel("cpu")
def _(
    dy: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
) -> Tensor:
    from qtune_kernels.cpu.product import multiplies, product

    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (dy.shape[-1], in_features)
    codes = Codes(packed, scales, levels, group_size, shape)
    if multiplies(dy, codes):
        rows = product(dy.reshape(-1, shape[0]), codes, outputs_first=False)
        return rows.view(*dy.shape[:-1], in_features)
    return dy @ temporary_weight(packed, scales, levels, group_size, shape, dy.dtype)


@linear_dx.register_kernel("cuda")
def _(
    dy: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
) -> Tensor:
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    shape = (dy.shape[-1], in_features)
    bits = code_bits(levels)
    tile = backward_tile(dy.numel() // shape[0], shape, dy.dtype, group_size, bits, dy.device)
    if tile is None:
        return dy @ temporary_weight(packed, scales, levels, group_size, shape, dy.dtype)
    from qtune_kernels import linear_triton

    return linear_triton.linear_dx(dy, packed, scales, levels, group_size, in_features, tile)


def temporary_weight(
    packed: Tensor,
    scales: Scales,
    levels: Sequence[float],
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [O, I] in `dtype`; on the CPU in a buffer that the next call overwrites."""
    if packed.device.type != "cpu":
        weight: Tensor = dequantize(packed, *scales, levels, group_size, *shape, dtype)
        return weight
    flat = scratch("weight", stored_weights(packed, levels), dtype)
    dequantize_into(flat, packed, scales, levels, group_size)
    return flat[: shape[0] * shape[1]].view(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, levels, group_size, _, bias = inputs
    ctx.save_for_backward(*weight)
    ctx.levels, ctx.group_size, ctx.in_features = levels, group_size, x.shape[-1]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = linear_dx(dy, *ctx.saved_tensors, ctx.levels, ctx.group_size, ctx.in_features)
    if ctx.has_bias and ctx.needs_input_grad[9]:
        db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, *[None] * 8, db


linear.register_autograd(_backward, setup_context=_save)
