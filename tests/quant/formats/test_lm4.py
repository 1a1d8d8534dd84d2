"""LM4 against the conditions of Lloyd and Max, on samples."""

from collections.abc import Callable

import pytest
import torch

from qtune.quant.format import load_format
from qtune.quant.formats.lm4 import LEVELS


def test_levels_are_symmetric_and_ascend() -> None:
    levels = torch.tensor(LEVELS)
    assert len(LEVELS) == 16
    assert torch.equal(levels, -levels.flip(0)) and levels.diff().min() > 0


def test_each_level_is_the_mean_of_what_it_stands_for() -> None:
    groups = torch.randn(1 << 16, 64, generator=torch.Generator().manual_seed(0))
    fmt = load_format("lm4")
    params = fmt.fit(groups)
    largest = params.scales.double().unsqueeze(1)
    # an error counts as much as its group is large
    ratios, weights = groups.double() / largest, largest.square().expand_as(groups)
    codes = fmt.encode(groups, params).long().flatten()
    total = torch.zeros(16, dtype=torch.float64)
    mass = total.index_add(0, codes, weights.flatten())
    mean = total.index_add(0, codes, (ratios * weights).flatten()) / mass
    assert torch.allclose(mean, torch.tensor(LEVELS).double(), atol=2e-3)


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("lm4", search=False) == pytest.approx(0.0076, rel=0.02)
    assert gaussian_error("lm4", search=True) == pytest.approx(0.0072, rel=0.02)


def test_no_other_format_of_four_bits_loses_less(
    gaussian_error: Callable[..., float],
) -> None:
    found = gaussian_error("lm4", search=True)
    others = ["nf4", "fp4", "int4", "int4_sym"]
    assert all(found < 1.001 * gaussian_error(name, search=True) for name in others)
