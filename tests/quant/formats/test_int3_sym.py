"""INT3 without zero points: levels, signs of scales, errors on normal values."""

from collections.abc import Callable

import pytest
from format_checks import bits_of_a_weight, check_scales_are_halves_of_both_signs, gain_of_signs

from qtune.quant.format import load_format


def test_levels() -> None:
    assert load_format("int3_sym").levels == tuple(range(-4, 4))


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("int3_sym", search=True) == pytest.approx(0.0313, rel=0.03)


def test_a_sign_is_worth_a_tenth_of_the_error() -> None:
    assert gain_of_signs("int3_sym") < 0.9


def test_stored_scales_are_halves_of_both_signs() -> None:
    check_scales_are_halves_of_both_signs("int3_sym")


def test_bits_of_a_weight() -> None:
    expected = 3 + 8 / 64 + 32 / (64 * 256)
    assert bits_of_a_weight("int3_sym") == pytest.approx(expected, abs=1e-4)
