"""Learning rates at the steps that matter, and what decays."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from qtune.recipe import Train
from qtune.train.optim import adamw, learning_rate

PEAK, STEPS, WARMUP = 2e-4, 100, 10


def rate(step: int, **settings: object) -> float:
    options = {"steps": STEPS, "lr": PEAK, "warmup_steps": WARMUP, **settings}
    return learning_rate(step, STEPS, Train(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    rates = [rate(step, schedule=schedule) for step in range(WARMUP + 1)]
    assert rates[0] == pytest.approx(PEAK / 11)
    steps = [b - a for a, b in pairwise(rates)]
    assert steps == pytest.approx([PEAK / 11] * WARMUP)
    assert rates[WARMUP] == pytest.approx(PEAK)
    assert max(rate(step, schedule=schedule) for step in range(STEPS)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 55, 0.5),
        ("cosine", 99, (1 + math.cos(math.pi * 89 / 90)) / 2),
        ("cosine", 100, 0.0),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("linear", 100, 0.0),
        ("constant", 55, 1.0),
        ("constant", 99, 1.0),
    ],
)
def test_schedule(schedule: str, step: int, expected: float) -> None:
    assert rate(step, schedule=schedule) == pytest.approx(PEAK * expected, abs=1e-18)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falls_and_never_vanishes_before_the_end(schedule: str) -> None:
    rates = [rate(step, schedule=schedule) for step in range(WARMUP, STEPS)]
    assert all(a > b > 0 for a, b in pairwise(rates))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_and_for_one_step(schedule: str) -> None:
    assert rate(0, schedule=schedule, warmup_steps=0) == pytest.approx(PEAK)
    one = Train(steps=1, lr=PEAK, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(0, 1, one) == pytest.approx(PEAK)


def test_as_torch_has_it() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        ours = rate(step, schedule="cosine", warmup_steps=0)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        cosine.step()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    optimizer = adamw(model.parameters(), Train(steps=1, lr=PEAK, weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        id(model[0].weight): 0.1,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }


def test_one_step_of_adamw() -> None:
    weight = nn.Parameter(torch.full((2, 2), 2.0))
    settings = Train(steps=1, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer = adamw([weight], settings)
    (weight * 3).sum().backward()
    optimizer.step()
    # decay by lr * 0.5, then a first step of lr whatever the gradient's size
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 2.0 * 0.95 - 0.1))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_only_matrices() -> None:
    optimizer = adamw([nn.Parameter(torch.zeros(2, 2))], Train(steps=1))
    assert len(optimizer.param_groups) == 1
