import pytest
import torch
from torch import Tensor

from qtune.quant.kquants import descent
from qtune.quant.kquants.descent import Block, fit
from qtune.quant.kquants.kinds import KINDS
from qtune.quant.kquants.moments import Target

SHARING = ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]


def target_of(kind: str, factor: float = 0.02) -> Target:
    torch.manual_seed(0)
    shape = KINDS[kind].groups, KINDS[kind].size, 60
    # scales of groups differ
    x = torch.randn(shape) * torch.rand(shape[0], 1, shape[2]).exp() * factor
    return Target.of(x, torch.rand(shape) + 0.1)


def weights(block: Block) -> Tensor:
    scaled = block.scales.values.unsqueeze(1) * block.levels
    return scaled if block.minima is None else scaled - block.minima.values.unsqueeze(1)


def error(target: Target, block: Block) -> float:
    return float((target.worth * (target.x - weights(block)).square()).sum())


@pytest.mark.parametrize("kind", SHARING)
def test_each_turn_lowers_the_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(kind)
    found = []
    for turns in (0, 1, 3):
        monkeypatch.setattr(descent, "TURNS", turns)
        found.append(error(target, fit(target, KINDS[kind])))
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_bytes_can_hold(kind: str) -> None:
    made, block = KINDS[kind], fit(target_of(kind), KINDS[kind])
    for part, allowed in ((block.scales, made.steps), (block.minima, made.minima)):
        assert (part is None) == (allowed is None)
        if part is not None and allowed is not None:
            assert torch.equal(part.step, part.step.half().float())
            assert torch.equal(part.counts, part.counts.round())
            assert allowed.low <= part.counts.min() and part.counts.max() <= allowed.high
    assert made.levels.codes(block.levels).max() > 0


@pytest.mark.parametrize("kind", SHARING)
def test_a_shared_step_costs_little(kind: str) -> None:
    """Against a step and a minimum of its own for each group, as floats."""
    target, made = target_of(kind), KINDS[kind]
    alone, shared = 0.0, error(target, fit(target, made))
    plain = type(made)(0, 1, made.size, made.levels, made.steps, made.minima)
    for group in range(made.groups):
        part = Target(*(of[group : group + 1] for of in target))
        alone += error(part, fit(part, plain))
    assert shared < 1.2 * alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_too_small_for_16_bits_is_the_smallest(kind: str) -> None:
    target = target_of(kind, 2.0**-22)
    block = fit(target, KINDS[kind])
    assert (block.scales.step != 0).all()
    assert error(target, block) < float((target.worth * target.x.square()).sum())
