"""unsloth's one kernel for the middle of the MLP's backward: h and both gradients, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def gate_backward(dh: Tensor, e: Tensor, g: Tensor) -> None:
    """Write h over dh, the gradient of e over e and that of g over g; all of one shape."""
    with torch.cuda.device_of(dh):
        _gate_backward_kernel[(triton.cdiv(dh.numel(), BLOCK),)](
            dh, e, g, dh.numel(), BLOCK=BLOCK, num_warps=4
        )


@triton.jit
def _gate_backward_kernel(dh_ptr, e_ptr, g_ptr, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num
    dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + at, mask=live, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-e))
    act = e * s
    dtype = dh_ptr.dtype.element_ty
    tl.store(dh_ptr + at, (act * g).to(dtype), mask=live)
    tl.store(e_ptr + at, (dh * g * s * (1.0 + e * (1.0 - s))).to(dtype), mask=live)
    tl.store(g_ptr + at, (dh * act).to(dtype), mask=live)
