"""The adapter's part of a fused product, R columns wide, as the start of the sum.

A sum of many parts starts with it in its first part only. Operands are rounded to the dtype of x,
as the weight is; the scaling is put on the float32 sums before the base's part comes onto them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Adapter(NamedTuple):
    """What a product starts with: `narrow` [T, R] times `matrix`, which is B [O, R] or A [R, I]."""

    narrow: Tensor
    matrix: Tensor
    scaling: float = 1.0


def adapter_arguments(adapter: Adapter | None) -> dict[str, Tensor | float]:
    """What the kernels of `linear_triton` get for it; nothing where there is none."""
    if adapter is None:
        return {}
    narrow, matrix, scaling = adapter
    return {
        "narrow_ptr": narrow.contiguous(),
        "matrix_ptr": matrix.contiguous(),
        "scaling": scaling,
        "RANK": narrow.shape[1],
    }


@triton.jit
def narrow_product(
    left_ptr,
    row,
    right_ptr,
    column,
    step,
    across,
    scaling,
    RANK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Float32 [rows, columns]: rows of left [N, R] times columns of right, times `scaling`.

    In `right` the next of R lies `step` further on, the next column `across`. Zero for rank 0, and
    in all parts of the sum but the first.
    """
    sums = tl.full((row.shape[0], column.shape[0]), 0.0, tl.float32)
    if RANK > 0:
        BLOCK_R: tl.constexpr = 16 if RANK <= 16 else (32 if RANK <= 32 else 64)
        last = tl.where(tl.program_id(1) == 0, RANK, 0)
        for start in range(0, last, BLOCK_R):
            narrow = start + tl.arange(0, BLOCK_R)
            live = narrow < RANK
            left_at = left_ptr + row[:, None] * RANK + narrow[None, :]
            right_at = right_ptr + narrow[:, None] * step + column[None, :] * across
            left = tl.load(left_at, mask=live[None, :], other=0.0).to(DTYPE)
            right = tl.load(right_at, mask=live[:, None], other=0.0).to(DTYPE)
            sums = tl.dot(left, right, sums)
        sums *= scaling
    return sums
