"""Activations in 8 bits: one scale for each row, and which columns are better left in 16 bits.

This is the vector-wise quantization of LLM.int8() (arXiv 2208.07339, section 3). Each row of x is
divided by its largest magnitude and rounded to 8 bits. Columns in which some magnitude exceeds a
threshold would cost all the others their precision, so they are left out of scales and codes. In
bitsandbytes a small value in such a column still counts for its row's scale; here none does. Codes
are otherwise the same, and the same on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# a row with no larger magnitude is taken for zero: the reciprocal might not be finite
NOTHING = 2.0**-100


class QuantizedRows(NamedTuple):
    """Rows in 8 bits: `codes` int8 [T, I], `scales` float32 [T], `outliers` bool [I].

    A row is nearly `codes / 127 * scale`, save for the outlier columns, whose codes are zero.
    """

    codes: Tensor
    scales: Tensor
    outliers: Tensor


@torch.library.custom_op("qtune::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `QuantizedRows` of x [T, I]; there are no outliers with a threshold of 0."""
    outliers = (x.abs() > (threshold or torch.inf)).any(0)
    rows = x.float().masked_fill(outliers, 0)
    largest = rows.abs().amax(1)
    steps = torch.where(largest > NOTHING, largest.reciprocal() * 127, 0).unsqueeze(1)
    codes = rows.mul_(steps).round_().to(torch.int8)
    return codes, largest, outliers


@quantize_rows.register_fake
def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    return codes, scales, x.new_empty(x.shape[1], dtype=torch.bool)


@quantize_rows.register_kernel("cuda")
def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    from qtune_kernels import quantize_rows_triton

    return quantize_rows_triton.quantize_rows(x, threshold)
