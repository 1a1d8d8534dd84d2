"""LM3 against the conditions of Lloyd and Max, on samples."""

from collections.abc import Callable

import pytest
from format_checks import (
    check_each_level_is_the_mean_of_what_it_stands_for,
    check_levels_are_symmetric_and_ascend,
)

from qtune.quant.formats.lm3 import LEVELS


def test_levels_are_symmetric_and_ascend() -> None:
    check_levels_are_symmetric_and_ascend(LEVELS, bits=3)


def test_each_level_is_the_mean_of_what_it_stands_for() -> None:
    check_each_level_is_the_mean_of_what_it_stands_for("lm3")


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("lm3", search=False) == pytest.approx(0.0315, rel=0.02)
    assert gaussian_error("lm3", search=True) == pytest.approx(0.0302, rel=0.02)


def test_no_other_format_of_three_bits_loses_less(gaussian_error: Callable[..., float]) -> None:
    found = gaussian_error("lm3", search=True)
    others = ["int3", "int3_sym"]
    assert all(found < 1.001 * gaussian_error(name, search=True) for name in others)
