"""INT2 without zero points: half-integers, and what they gain."""

from collections.abc import Callable

import pytest
import torch
from format_checks import bits_of_a_weight

from qtune.quant.format import load_format


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
    expected = 2 + 8 / 64 + 32 / (64 * 256)
    assert bits_of_a_weight("int2_sym") == pytest.approx(expected, abs=1e-4)
