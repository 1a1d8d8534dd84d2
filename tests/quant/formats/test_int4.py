"""INT4 against the prototype's arithmetic in float64, and its known errors on normal values."""

from collections.abc import Callable

import pytest
from format_checks import bits_of_a_weight, check_zero_points_are_whole_and_scales_halves


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("int4", search=False) == pytest.approx(0.0083, rel=0.03)
    assert gaussian_error("int4", search=True) == pytest.approx(0.0076, rel=0.03)


def test_stored_zero_points_are_whole_and_scales_halves() -> None:
    check_zero_points_are_whole_and_scales_halves("int4")


def test_bits_of_a_weight() -> None:
    # codes, a byte for the scale of 64, 4 bits for their zero, 4 bytes for 256 scales
    expected = 4 + 8 / 64 + 4 / 64 + 32 / (64 * 256)
    assert bits_of_a_weight("int4") == pytest.approx(expected, abs=1e-4)
