"""The gated activation of a transformer's MLP (arXiv 2002.05202): act(gate) * up.

Both activations are x sigmoid(z(x)): z is x for `silu`, and for `gelu_tanh` twice the argument of
its tanh. Products are taken in float32 and rounded once. Autograd keeps gate and up only, the
activation is found again in the backward pass.

`room` elements are left free behind each row of h, dgate and dup for the products that read them
(rows.py).
"""

from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from qtune_kernels.rows import empty_rows

ACTIVATIONS = ("silu", "gelu_tanh")
# gelu_tanh(x) = x sigmoid(GELU_SLOPE (x + GELU_CUBIC x^3)), from 0.5 (1 + tanh u) = sigmoid(2 u)
GELU_SLOPE = 2 * sqrt(2 / pi)
GELU_CUBIC = 0.044715


@torch.library.custom_op("qtune::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, activation: str, room: int = 0) -> Tensor:
    """h = act(gate) * up, [..., I] in the dtype of gate [..., I]; ValueError: unknown name."""
    _check(activation)
    return _gated(gate, up, activation)


@gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str, room: int = 0) -> Tensor:
    return empty_rows(gate, room)


@gated.register_kernel("cpu")
def _(gate: Tensor, up: Tensor, activation: str, room: int = 0) -> Tensor:
    from qtune_kernels.cpu import gated, rowwise

    _check(activation)
    run = gated.gated if rowwise.takes(gate, up) else _gated
    return run(gate, up, activation)


@gated.register_kernel("cuda")
def _(gate: Tensor, up: Tensor, activation: str, room: int = 0) -> Tensor:
    from qtune_kernels import swiglu_triton

    _check(activation)
    return swiglu_triton.gated(gate, up, activation, empty_rows(gate, room))


@torch.library.custom_op("qtune::gated_backward", mutates_args=())
def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, room: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up [..., I], in their dtypes, from that of h."""
    return _gated_backward(dh, gate, up, activation)


@gated_backward.register_fake
def _(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, room: int = 0
) -> tuple[Tensor, Tensor]:
    return empty_rows(gate, room), empty_rows(up, room)


@gated_backward.register_kernel("cpu")
def _(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, room: int = 0
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import gated, rowwise

    run = gated.gated_backward if rowwise.takes(dh, gate, up) else _gated_backward
    return run(dh, gate, up, activation)


@gated_backward.register_kernel("cuda")
def _(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, room: int = 0
) -> tuple[Tensor, Tensor]:
    from qtune_kernels import swiglu_triton

    out = empty_rows(gate, room), empty_rows(up, room)
    return swiglu_triton.gated_backward(dh, gate, up, activation, out)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    act, _ = _activate(gate.float(), activation)
    return (act * up).to(gate.dtype).contiguous()


def _gated_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    act, slope = _activate(gate.float(), activation)
    dgate, dup = dh * up.float() * slope, dh * act
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")


def _activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of float32 x, and its derivative."""
    if activation == "silu":
        z, dz = x, torch.ones_like(x)
    else:
        z = GELU_SLOPE * (x + GELU_CUBIC * x**3)
        dz = GELU_SLOPE * (1 + 3 * GELU_CUBIC * x**2)
    sigmoid = torch.sigmoid(z)
    return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid) * dz


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.room = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward(dh, *ctx.saved_tensors, ctx.activation, ctx.room), None, None


gated.register_autograd(_backward, setup_context=_save)
