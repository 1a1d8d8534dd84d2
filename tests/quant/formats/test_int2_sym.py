"""INT2 without zero points: half-integers, and what they gain."""

from collections.abc import Callable

import pytest
import torch

from qtune.quant.format import load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import storage_bytes


def test_levels_are_halves() -> None:
    assert load_format("int2_sym").levels == (-1.5, -0.5, 0.5, 1.5)


def test_scales_are_positive() -> None:
    groups = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    fitted = load_format("int2_sym").fit(groups).scales
    assert torch.allclose(fitted, groups.abs().amax(1) / 1.5)


def test_halves_lose_less_than_integers(gaussian_error: Callable[..., float]) -> None:
    halves = gaussian_error("int2_sym", search=True)
    assert halves == pytest.approx(0.113, rel=0.03)
    assert halves < 0.92 * gaussian_error("int2", search=True)


def test_bits_of_a_weight() -> None:
    size = sum(storage_bytes((1024, 1024), Storage("int2_sym")).values())
    assert size * 8 / 2**20 == pytest.approx(2 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
