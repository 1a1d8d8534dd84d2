"""The CPU kernels of `gated` and `gated_backward`."""

from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.math import sigmoid
from qtune_kernels.cpu.rowwise import BYTES, KINDS, name, walk
from qtune_kernels.cpu.simd import Code, Value
from qtune_kernels.layout import as_rows, row_stride
from qtune_kernels.swiglu import GELU_CUBIC, GELU_SLOPE


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """h = act(gate) * up, [..., I]."""
    h = gate.new_empty(gate.shape)
    width = gate.shape[-1]
    gate, up = as_rows(gate, width), as_rows(up, width)
    _gated(
        gate.data_ptr(),
        up.data_ptr(),
        h.data_ptr(),
        len(gate),
        row_stride(gate),
        row_stride(up),
        width=width,
        dtype=name(gate),
        activation=activation,
    )
    return h


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, [..., I]."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    width = gate.shape[-1]
    dh, gate, up = (as_rows(tensor, width) for tensor in (dh, gate, up))
    _gated_backward(
        dh.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr(),
        dup.data_ptr(),
        len(gate),
        row_stride(dh),
        row_stride(gate),
        row_stride(up),
        width=width,
        dtype=name(gate),
        activation=activation,
    )
    return dgate, dup


@kernel
def _gated(
    code: KernelCode,
    gate: Pointer,
    up: Pointer,
    h: Pointer,
    num_rows: Integer,
    gate_stride: Integer,
    up_stride: Integer,
    *,
    width: int,
    dtype: str,
    activation: str,
) -> None:
    size, kind = BYTES[dtype], KINDS[dtype]
    with code.share(num_rows) as row:
        gate_at, up_at = gate + row * gate_stride * size, up + row * up_stride * size
        h_at = h + row * (width * size)

        def write(column: Value, turn: int, live: Value | None) -> None:
            at = column * size
            x = code.read(gate_at + at, kind, live)
            y = x * _weight(code, x, activation) * code.read(up_at + at, kind, live)
            code.write(y, h_at + at, kind, live)

        walk(code, width, write)


@kernel
def _gated_backward(
    code: KernelCode,
    dh: Pointer,
    gate: Pointer,
    up: Pointer,
    dgate: Pointer,
    dup: Pointer,
    num_rows: Integer,
    dh_stride: Integer,
    gate_stride: Integer,
    up_stride: Integer,
    *,
    width: int,
    dtype: str,
    activation: str,
) -> None:
    size, kind = BYTES[dtype], KINDS[dtype]
    with code.share(num_rows) as row:
        dh_at, gate_at = dh + row * dh_stride * size, gate + row * gate_stride * size
        up_at, made_at = up + row * up_stride * size, row * (width * size)

        def write(column: Value, turn: int, live: Value | None) -> None:
            at = column * size
            x, gradient = (code.read(start + at, kind, live) for start in (gate_at, dh_at))
            weight = _weight(code, x, activation)
            act = x * weight
            slope = weight + act * (1.0 - weight) * _inner_slope(x, activation)
            dx = gradient * code.read(up_at + at, kind, live) * slope
            code.write(dx, dgate + made_at + at, kind, live)
            code.write(gradient * act, dup + made_at + at, kind, live)

        walk(code, width, write)


def _weight(code: Code, x: Value, activation: str) -> Value:
    """sigmoid(z(x)), of which x times is the activation."""
    if activation == "gelu_tanh":
        x = GELU_SLOPE * (x + GELU_CUBIC * (x * x * x))
    return sigmoid(code, x)


def _inner_slope(x: Value, activation: str) -> Value | float:
    """The derivative of z."""
    if activation == "silu":
        return 1.0
    return GELU_SLOPE * (1.0 + 3 * GELU_CUBIC * (x * x))
