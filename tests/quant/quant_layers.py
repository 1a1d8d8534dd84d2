"""Layers for tests of methods: weights, inputs with strong and correlated channels, errors."""

import torch
from torch import Tensor

from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage


def weight_of(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    """A float32 weight [O, I]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(columns: int = 128, tokens: int = 300, seed: int = 1) -> Tensor:
    """The mean of x^T x, float32 [I, I], over inputs of which some are strong and all related."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) @ (mix + torch.eye(columns)) * sizes
    return x.T @ x / tokens


def output_error(layer: QuantLinear, weight: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) in float64."""
    w, h = weight.double(), hessian.double()
    change = layer.dequantize(torch.float32).double() - w
    return float(((change @ h) * change).sum() / ((w @ h) * w).sum())


def empty(weight: Tensor, **storage: object) -> QuantLinear:
    """A layer without codes for that weight."""
    rows, columns = weight.shape
    return QuantLinear(columns, rows, storage=Storage(**storage))  # type: ignore[arg-type]
