"""The CUDA kernels of `gated` and `gated_backward`: each element is read once and written once.

Rows of every operand may lie apart: gate and up are often the halves of one product, and results
may go where a product reads them together with what is put in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.layout import as_rows, row_stride
from qtune_kernels.swiglu import GELU_CUBIC, GELU_SLOPE

_GELU_CUBIC = tl.constexpr(GELU_CUBIC)
_GELU_SLOPE = tl.constexpr(GELU_SLOPE)
# 8 elements a thread of four warps: one load of 16 bytes from each operand
BLOCK = 1024


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """h [..., I], or `out` [T, I] with it written there; rows of `out` may lie apart."""
    h = gate.new_empty(gate.shape) if out is None else out
    width = gate.shape[-1]
    gate, up = as_rows(gate, width), as_rows(up, width)
    with torch.cuda.device_of(gate):
        _gated_kernel[(len(gate) * triton.cdiv(width, BLOCK),)](
            gate,
            up,
            h,
            width,
            gate.stride(0),
            up.stride(0),
            row_stride(h),
            GELU=activation == "gelu_tanh",
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return h


def gated_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """dgate and dup [..., I], or `out`, two of [T, I], with them written there."""
    dgate, dup = out or (gate.new_empty(gate.shape), up.new_empty(up.shape))
    width = gate.shape[-1]
    dh, gate, up = (as_rows(tensor, width) for tensor in (dh, gate, up))
    with torch.cuda.device_of(gate):
        _gated_backward_kernel[(len(gate) * triton.cdiv(width, BLOCK),)](
            dh,
            gate,
            up,
            dgate,
            dup,
            width,
            dh.stride(0),
            gate.stride(0),
            up.stride(0),
            row_stride(dgate),
            row_stride(dup),
            GELU=activation == "gelu_tanh",
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dgate, dup


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """This program's row, int64, its columns, and which of them there are."""
    blocks = (width + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), column, column < width


@triton.jit
def _sigmoid(x, GELU: tl.constexpr):
    """sigmoid(z(x)), of which x times is the activation."""
    z = x
    if GELU:
        z = _GELU_SLOPE * (x + _GELU_CUBIC * x * x * x)
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _gated_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    width,
    gate_stride,
    up_stride,
    h_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, live = _place(width, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    h = gate * _sigmoid(gate, GELU) * up
    tl.store(h_ptr + row * h_stride + column, h.to(h_ptr.dtype.element_ty), mask=live)


@triton.jit
def _gated_backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    dh_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, live = _place(width, BLOCK)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate, GELU)
    act = gate * sigmoid
    dz = 1.0
    if GELU:
        dz = _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * gate * gate)
    dgate = dh * up * (sigmoid + act * (1.0 - sigmoid) * dz)
    dup = dh * act
    dgate_at = dgate_ptr + row * dgate_stride + column
    tl.store(dgate_at, dgate.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + row * dup_stride + column, dup.to(dup_ptr.dtype.element_ty), mask=live)
