"""Learning rates at the steps that matter, and beside the schedules of PyTorch and transformers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from transformers.optimization import (
    get_constant_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from qtune.recipe import Train
from qtune.train.schedule import learning_rate

PEAK, STEPS, WARMUP = 2e-4, 100, 10
ALL = ["cosine", "linear", "constant", "wsd", "one_cycle"]


def rate(step: int, **settings: Any) -> float:
    options = {"steps": STEPS, "lr": PEAK, "warmup_steps": WARMUP, **settings}
    return learning_rate(step, options["steps"], Train(**options))


def rates(**settings: Any) -> list[float]:
    return [rate(step, **settings) for step in range(settings.get("steps", STEPS))]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    first = rates(schedule=schedule)[: WARMUP + 1]
    assert first[0] == pytest.approx(PEAK / 11)
    assert [b - a for a, b in pairwise(first)] == pytest.approx([PEAK / 11] * WARMUP)
    assert first[WARMUP] == pytest.approx(PEAK)
    assert max(rates(schedule=schedule)) == pytest.approx(PEAK)


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
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.5),
        ("wsd", 99, 0.05),
        ("wsd", 100, 0.0),
    ],
)
def test_schedule(schedule: str, step: int, expected: float) -> None:
    assert rate(step, schedule=schedule) == pytest.approx(PEAK * expected, abs=1e-18)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falls_and_never_vanishes_before_the_end(schedule: str) -> None:
    assert all(a > b > 0 for a, b in pairwise(rates(schedule=schedule)[WARMUP:]))


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_reach_the_peak_and_learn_in_every_step(schedule: str, steps: int) -> None:
    found = rates(schedule=schedule, steps=steps, warmup_steps=0)
    assert max(found) <= PEAK * (1 + 1e-12) and min(found) > 0
    # one_cycle has its top between two steps
    assert max(found) > 0.7 * PEAK


def by_library(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"schedule": "cosine"}, lambda o: CosineAnnealingLR(o, STEPS)),
        ({"schedule": "linear"}, lambda o: get_linear_schedule_with_warmup(o, 0, STEPS)),
        ({"schedule": "constant"}, get_constant_schedule),
        (
            {"schedule": "wsd"},
            lambda o: get_wsd_schedule(o, 0, 20, num_training_steps=STEPS, decay_type="linear"),
        ),
        (
            {"schedule": "wsd", "decay_steps": 35},
            lambda o: get_wsd_schedule(o, 0, 35, num_training_steps=STEPS, decay_type="linear"),
        ),
        ({"schedule": "one_cycle"}, lambda o: OneCycleLR(o, PEAK, total_steps=STEPS)),
        (
            {"schedule": "one_cycle", "warmup_steps": 12},
            lambda o: OneCycleLR(o, PEAK, total_steps=STEPS, pct_start=0.12),
        ),
    ],
)
def test_as_the_libraries_have_it(settings: dict[str, Any], make: Any) -> None:
    assert rates(**{"warmup_steps": 0, **settings}) == pytest.approx(by_library(make), rel=1e-9)
