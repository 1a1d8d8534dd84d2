"""y = x W^T on integer arithmetic: INT8 weights meet activations quantized row by row.

This is LLM.int8() (arXiv 2208.07339, section 3): sums of products of codes are exact integers,
scaled in float32, and columns of x with outliers meet the dequantized weight in 16 bits. Unlike
there, a row of weights may have several scales.

The gradient passes the rounding of x straight through: dx = dy W with the dequantized weight. The
CUDA kernel is in linear_int8_triton.py. Where it does not apply (float32, groups that no step of 64
columns fits into), and on the CPU where rows have several scales, rows are decoded again and
multiplied by the decoded weight in float32: the same up to the rounding of float32, but no faster
than `linear`.
"""

from typing import Any

import torch
from torch import Tensor

from qtune_kernels.linear import linear, linear_dx
from qtune_kernels.quantize_rows import QuantizedRows, quantize_rows
from qtune_kernels.scales import Scales, dequantize_scales
from qtune_kernels.scratch import scratch

THRESHOLD = 6.0
# columns that a kernel's step multiplies; they must share a scale
STEP = 64


@torch.library.custom_op("qtune::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    threshold: float = THRESHOLD,
) -> Tensor:
    """y = x W^T + bias, [..., O] in the dtype of x [..., I], with x in 8 bits but for outliers.

    For the arguments of W see `dequantize`; it has 8-bit codes. With a threshold of 0 all of x is
    taken in 8 bits.
    """
    rows = x.reshape(-1, x.shape[-1])
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    integers = group_size % x.shape[-1] == 0 and zeros is None
    multiply = _multiply_integers if integers else _multiply_decoded
    y = multiply(rows, threshold, packed, scales, group_size, out_features)
    return _finish(y, bias, x)


@linear_int8.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    threshold: float = THRESHOLD,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@linear_int8.register_kernel("cuda")
def _(
    x: Tensor,
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
    threshold: float = THRESHOLD,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    if zeros is not None or not _has_kernel(rows, group_size):
        y = _multiply_decoded(rows, threshold, packed, scales, group_size, out_features)
        return _finish(y, bias, x)
    from qtune_kernels import linear_int8_triton

    quantized = QuantizedRows(*quantize_rows(rows, threshold))
    y = linear_int8_triton.linear(
        rows, quantized, packed, scales, group_size, out_features, bias, threshold > 0
    )
    return y.view(*x.shape[:-1], out_features)


def _has_kernel(rows: Tensor, group_size: int) -> bool:
    """Whether the columns of every step share a scale, and outliers have 16 bits."""
    whole_steps = rows.shape[1] % STEP == 0 and group_size % STEP == 0
    return whole_steps and rows.dtype in (torch.bfloat16, torch.float16)


def _multiply_decoded(
    rows: Tensor,
    threshold: float,
    packed: Tensor,
    scales: Scales,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The product, float32 [T, O], for any groups, on any device."""
    codes, row_scales, outliers = quantize_rows(rows, threshold)
    decoded = codes * (row_scales / 127).unsqueeze(1)
    kept = torch.where(outliers, rows.float(), decoded)
    y: Tensor = linear(kept, packed, *scales, [], group_size, out_features, None)
    return y


def _multiply_integers(
    rows: Tensor,
    threshold: float,
    packed: Tensor,
    scales: Scales,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The product, float32 [T, O], on the CPU, for weights with one scale for each row or more."""
    codes, row_scales, outliers = quantize_rows(rows, threshold)
    weight = scratch("weight", packed.numel(), torch.uint8)
    # less 128, in two's complement
    torch.bitwise_xor(packed, 128, out=weight)
    signed = weight.view(torch.int8).view(out_features, -1)
    y: Tensor = torch._int_mm(codes, signed.T) * (row_scales / 127).unsqueeze(1)
    columns = outliers.nonzero().squeeze(1)
    if columns.numel():
        y.addmm_(rows[:, columns].float(), signed[:, columns].T.float())
    feature_scales = dequantize_scales(scales).repeat_interleave(group_size // rows.shape[1])
    return y.mul_(feature_scales[:out_features])


def _finish(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The float32 product [T, O] with its bias, in the shape and dtype that x asks for."""
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, group_size, _, bias, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.group_size, ctx.in_features = group_size, x.shape[-1]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = linear_dx(dy, *ctx.saved_tensors, [], ctx.group_size, ctx.in_features)
    if ctx.has_bias and ctx.needs_input_grad[8]:
        db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, *[None] * 7, db, None


linear_int8.register_autograd(_backward, setup_context=_save)
