"""Sums that are split among programs: where the parts go, and how they come together.

They are added by a second kernel in a fixed order, not by atomics, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SUM_BLOCK = 1024


def partial_sums(out: Tensor, parts: int) -> Tensor:
    """Where the kernel writes: float32 [parts, *out.shape], or `out` itself for one part."""
    return out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)


def add_parts(sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum over parts, plus the bias, into `out`, unless the kernel has done so."""
    if sums is not out:
        grid = (triton.cdiv(out.numel(), _SUM_BLOCK),)
        _add_parts_kernel[grid](
            sums, bias, out, out.numel(), out.shape[1], PARTS=sums.shape[0], BLOCK=_SUM_BLOCK
        )


@triton.jit
def store_sums(sums_ptr, bias_ptr, sums, row, feature, num_rows, num_features):
    """Store a [rows, features] tile of this part's sums, with the bias where there is one."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0)
        sums += bias.to(tl.float32)
    part_at = tl.program_id(1).to(tl.int64) * num_rows * num_features
    at = row.to(tl.int64) * num_features + feature
    live = (row < num_rows) & (feature < num_features)
    tl.store(sums_ptr + part_at + at, sums.to(sums_ptr.dtype.element_ty), mask=live)


@triton.jit
def _add_parts_kernel(
    sums_ptr, bias_ptr, out_ptr, num_outputs, num_features, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_outputs
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums_ptr + part * num_outputs + at, mask=live, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % num_features, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=live)
