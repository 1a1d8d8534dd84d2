"""y = x W^T where codes are frozen and the scales of their groups are trained, zero points too.

PEQA, arXiv 2305.14152. What is trained are float32 numbers; what the product sees are these rounded
to float16, as they will be stored, and gradients pass the rounding as if it were not there. So the
model that is trained and measured is, bit for bit, the one that is written in the end.

A trained zero point is held as zero * scale, the group's shift in weights: W = level * scale -
shift. Its gradient is then minus the sum of dW and that of the scale the sum of dW * level, neither
with the other in it, and a step of an optimizer means the same for both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtune_kernels.linear import linear, linear_dx
from qtune_kernels.packing import code_bits
from qtune_kernels.scale_gradient import scale_gradient
from qtune_kernels.scales import Scales, unpack_zeros

HALF = torch.float16


def stored_scales(scales: Tensor, shifts: Tensor | None, zeros: Tensor | None) -> Scales:
    """Trained scales, float32 [S], as they are stored: in float16, as zero points of shifts are.

    Where there are no trained `shifts`, float32 [S], the frozen `zeros` are kept as they are.
    """
    codes, empty = scales.to(HALF), scales.new_empty(0, dtype=torch.float32)
    if shifts is not None:
        used = codes.float()
        # a group whose scale is zero has no weights that a zero point could move
        zeros = (shifts / used).where(used != 0, 0).to(HALF)
    return Scales(codes, empty, empty.clone(), zeros)


@torch.library.custom_op("qtune::scaled_linear", mutates_args=())
def scaled_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """y [..., O] in the dtype of x [..., I]; differentiable in x, scales, shifts and bias.

    `scales` and `shifts` are float32 [S]; for the other arguments see `dequantize`.
    """
    stored = stored_scales(scales, shifts, zeros)
    y: Tensor = linear(x, packed, *stored, levels, group_size, out_features, bias)
    return y


@scaled_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, shifts, zeros, levels, group_size, _, _ = inputs
    ctx.save_for_backward(x, packed, scales, shifts, zeros)
    ctx.levels, ctx.group_size = levels, group_size


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, shifts, zeros = ctx.saved_tensors
    dx = dscales = dshifts = dbias = None
    if ctx.needs_input_grad[0]:
        stored = stored_scales(scales, shifts, zeros)
        dx = linear_dx(dy, packed, *stored, ctx.levels, ctx.group_size, x.shape[-1])
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        dscales, sums = scale_gradient(dy, x, packed, ctx.levels, ctx.group_size)
        if shifts is not None:
            dshifts = -sums
        elif zeros is not None:
            bits = code_bits(ctx.levels)
            dscales = dscales - unpack_zeros(zeros, bits, scales.numel()) * sums
    if ctx.needs_input_grad[8]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, None, dscales, dshifts, *[None] * 4, dbias


scaled_linear.register_autograd(_backward, setup_context=_save)
