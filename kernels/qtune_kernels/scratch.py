"""CPU work buffers that are kept between calls.

A fresh temporary the size of a weight matrix costs more in page faults than in arithmetic: the
allocator hands large blocks back to the system, which maps and clears them again at the next call.
Each thread keeps its own buffers, so two threads never share one, and what is in a buffer is only
good until the next call.
"""

import threading

import torch
from torch import Tensor

_buffers = threading.local()


def scratch(role: str, numel: int, dtype: torch.dtype) -> Tensor:
    """This thread's CPU buffer for `role`, `dtype` [numel], uninitialized; it never shrinks."""
    kept: Tensor | None = getattr(_buffers, role, None)
    num_bytes = numel * dtype.itemsize
    if kept is None or kept.numel() < num_bytes:
        # an inference tensor could not be written to outside inference mode later on
        with torch.inference_mode(False):
            kept = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        setattr(_buffers, role, kept)
    return kept[:num_bytes].view(dtype)


def scratch_like(shape_of: Tensor, role: str, dtype: torch.dtype) -> Tensor:
    """An uninitialized buffer in the shape of a tensor; on the CPU the next call reuses it."""
    if shape_of.device.type != "cpu":
        return torch.empty_like(shape_of, dtype=dtype)
    return scratch(role, shape_of.numel(), dtype).view(shape_of.shape)
