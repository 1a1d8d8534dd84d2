"""Scales of single groups against a search over thousands of grids in float64."""

import pytest
import torch
from torch import Tensor

from qtune.quant.kquants import search
from qtune.quant.kquants.levels import Integers
from qtune.quant.kquants.moments import Target

GROUPS = 40


def target_of(values: Tensor | None = None) -> Target:
    torch.manual_seed(0)
    x = torch.randn(1, 32, GROUPS) if values is None else values
    return Target.of(x, torch.rand(x.shape) + 0.1)


def errors(target: Target, weights: Tensor) -> Tensor:
    return (target.worth * (target.x - weights).square()).sum(1)[0]


@pytest.mark.parametrize("levels", [Integers(-4, 3), Integers(-8, 7)], ids=["3 bits", "4 bits"])
def test_scales_are_near_the_best_of_all(levels: Integers) -> None:
    target = target_of()
    scales = search.scales(target, levels)
    found = errors(target, levels.nearest_(target.x / scales.unsqueeze(1)) * scales.unsqueeze(1))
    least = torch.full((GROUPS,), torch.inf)
    for scale in torch.linspace(-1.5, 1.5, 2000):
        least = least.minimum(errors(target, levels.nearest_(target.x / scale) * scale))
    assert found.sum() < 1.05 * least.sum()


def test_scales_of_weights_on_a_grid_are_exact() -> None:
    torch.manual_seed(0)
    on_grid = torch.randint(-8, 8, (1, 32, GROUPS)).float() * 0.3
    scales = search.scales(target_of(on_grid), Integers(-8, 7))
    back = (on_grid / scales.unsqueeze(1)).round() * scales.unsqueeze(1)
    assert torch.allclose(back, on_grid, atol=1e-5)


@pytest.mark.parametrize("negative", [False, True])
def test_minima_take_part(negative: bool) -> None:
    target = target_of(torch.rand(1, 32, GROUPS) + 1)
    scales, minima = search.scales_and_minima(target, Integers(0, 15), negative)
    assert (minima < 0).all() if negative else (minima >= 0).all()
    levels = ((target.x + minima.unsqueeze(1)) / scales.unsqueeze(1)).round().clamp(0, 15)
    found = errors(target, levels * scales.unsqueeze(1) - minima.unsqueeze(1))
    # a step is a fifteenth of the range from the least weight, or from 0
    step = (1 if negative else 2) / 15
    assert (found < target.worth.sum(1)[0] * step**2 / 10).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_equal_weights_are_met(value: float) -> None:
    target = target_of(torch.full((1, 32, GROUPS), value))
    scales, minima = search.scales_and_minima(target, Integers(0, 15))
    inverse = 1 / scales.where(scales > 0, torch.inf)
    levels = ((target.x + minima) * inverse.unsqueeze(1)).round().clamp(0, 15)
    back = levels * scales.unsqueeze(1) - minima.unsqueeze(1)
    assert torch.allclose(back, target.x, atol=1e-6)
