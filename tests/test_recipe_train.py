"""The train section's own checks."""

from typing import Any

import pytest

from qtune.errors import UserError
from qtune.recipe_train import Preference, Train


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "train needs either steps or epochs, and not both"),
        ({"steps": 1, "epochs": 1.0}, "train needs either steps or epochs, and not both"),
        ({"steps": 0}, "train.steps (0) must be at least 1"),
        ({"epochs": 0.0}, "train.epochs (0.0) must be positive"),
        ({"steps": 1, "lr": 0.0}, "train.lr (0.0) must be positive"),
        ({"steps": 1, "batch_size": 0}, "train.batch_size (0) must be at least 1"),
        ({"steps": 1, "keep": 0}, "train.keep (0) must be at least 1"),
        ({"steps": 1, "micro_batch_tokens": 0}, "train.micro_batch_tokens (0) must be at least 1"),
        (
            {"steps": 10, "warmup_steps": 10},
            "train.warmup_steps (10) must be less than train.steps (10)",
        ),
        (
            {"steps": 10, "schedule": "wsd", "warmup_steps": 4, "decay_steps": 7},
            "train.warmup_steps (4) and train.decay_steps (7) together are more than train.steps",
        ),
        ({"steps": 10, "decay_steps": 7}, "train.decay_steps is for train.schedule: wsd"),
        ({"steps": 1, "betas": (0.9, 1.0)}, "train.betas (1.0) must be in [0, 1)"),
        ({"steps": 1, "max_grad_norm": 0.0}, "must be positive; null switches it off"),
        ({"steps": 1, "neftune_alpha": 0.0}, "must be positive; null switches it off"),
        ({"steps": 1, "lora_plus_ratio": 0.0}, "train.lora_plus_ratio (0.0) must be positive"),
        ({"steps": 1, "ema_decay": 1.0}, "train.ema_decay (1.0) must be between 0 and 1"),
        ({"steps": 1, "spike_factor": 1.0}, "train.spike_factor (1.0) must be greater than 1"),
        ({"steps": 1, "patience": 0}, "train.patience (0) must be at least 1"),
        ({"steps": 1, "keep_best": True, "eval_every": 0}, "train.keep_best needs train.eval_ev"),
        ({"steps": 1, "patience": 2, "eval_every": 0}, "train.patience needs train.eval_every"),
    ],
)
def test_senseless_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Train(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0.5, "warmup_steps": 100},
        {"steps": 10, "warmup_steps": 9},
        {"steps": 10, "schedule": "wsd", "warmup_steps": 3, "decay_steps": 7},
    ],
)
def test_values_at_the_limits(given: dict[str, Any]) -> None:
    made = Train(**given)
    assert {name: getattr(made, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"margin": -1.0}, "margin"),
        ({"undesirable_weight": -1.0}, "undesirable_weight"),
    ],
)
def test_senseless_preferences(given: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"train\.preference\.{key}"):
        Preference(**given)


def test_strength_depends_on_the_objective_unless_it_is_given() -> None:
    assert Train(steps=1, objective="simpo").beta == 2.0
    assert Train(steps=1, objective="dpo").beta == 0.1
    assert Train(steps=1, objective="dpo", preference=Preference(beta=0.3)).beta == 0.3
