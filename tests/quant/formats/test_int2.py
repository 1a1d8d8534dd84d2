"""INT2 against the prototype's arithmetic in float64, and its known errors on normal values."""

from collections.abc import Callable

import pytest
from format_checks import bits_of_a_weight, check_zero_points_are_whole_and_scales_halves


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("int2", search=False) == pytest.approx(0.208, rel=0.03)
    assert gaussian_error("int2", search=True) == pytest.approx(0.126, rel=0.03)


def test_stored_zero_points_are_whole_and_scales_halves() -> None:
    check_zero_points_are_whole_and_scales_halves("int2")


def test_bits_of_a_weight() -> None:
    # codes, a byte for the scale of 64, 2 bits for their zero, 4 bytes for 256 scales
    expected = 2 + 8 / 64 + 2 / 64 + 32 / (64 * 256)
    assert bits_of_a_weight("int2") == pytest.approx(expected, abs=1e-4)
