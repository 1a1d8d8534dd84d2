"""Activations with outliers, and what their 8-bit form stands for, for the tests of INT8."""

import torch
from torch import Tensor

from qtune_kernels.quantize_rows import quantize_rows


def activations(*shape: int, dtype: torch.dtype = torch.float32, num_outliers: int = 2) -> Tensor:
    """Random numbers below 6 in magnitude, save for one in each of some columns."""
    x = torch.randn(*shape).clamp_(-5, 5)
    rows = x.view(-1, shape[-1])
    columns = torch.randperm(shape[-1])[:num_outliers]
    rows[torch.randint(rows.shape[0], (num_outliers,)), columns] = 40.0
    return x.to(dtype)


def decoded(x: Tensor, threshold: float) -> Tensor:
    """What the quantized rows stand for, float64, computed from their parts."""
    codes, scales, outliers = quantize_rows(x, threshold)
    rows = codes.double() / 127 * scales.double().unsqueeze(1)
    return torch.where(outliers, x.double(), rows)
