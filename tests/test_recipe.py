"""The recipe's own checks, and what its defaults promise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qtune.errors import UserError
from qtune.recipe import Data, Evaluate, Lora, Quant, Recipe, Train


def recipe(**changes: Any) -> Recipe:
    given = {"model": "m", "data": Data(train="t"), "train": Train(steps=1), "run": Path("r")}
    return Recipe(**{**given, **changes})


def test_only_model_data_train_and_run_are_needed() -> None:
    needed = [
        field.name
        for field in dataclasses.fields(Recipe)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    assert needed == ["model", "data", "train", "run"]
    assert recipe().quant == Quant() and recipe().lora == Lora() and recipe().evaluate == Evaluate()


def test_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().seed = 1  # type: ignore[misc]


def test_defaults_are_not_shared() -> None:
    assert Lora().rank_pattern is not Lora().rank_pattern


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        (Data, {"train": "t", "max_length": 7}, "data.max_length (7) must be at least 8"),
        (Quant, {"group_size": 48}, "quant.group_size (48) must be a power of two, 16 or more"),
        (Quant, {"group_size": 8}, "quant.group_size (8) must be a power of two, 16 or more"),
        (Quant, {"group_size": 0}, "quant.group_size (0) must be a power of two, 16 or more"),
        (Quant, {"group_size": -64}, "quant.group_size (-64) must be a power of two, 16 or more"),
        (Lora, {"rank": 0}, "lora.rank (0) must be at least 1"),
        (Lora, {"dropout": 1.0}, "lora.dropout (1.0) must be in [0, 1)"),
        (Lora, {"dropout": -0.1}, "lora.dropout (-0.1) must be in [0, 1)"),
        (Train, {}, "train needs either steps or epochs, and not both"),
        (Train, {"steps": 1, "epochs": 1.0}, "train needs either steps or epochs, and not both"),
        (Train, {"steps": 0}, "train.steps (0) must be at least 1"),
        (Train, {"epochs": 0.0}, "train.epochs (0.0) must be positive"),
        (Train, {"steps": 1, "lr": 0.0}, "train.lr (0.0) must be positive"),
        (Train, {"steps": 1, "batch_size": 0}, "train.batch_size (0) must be at least 1"),
        (Train, {"steps": 1, "keep": 0}, "train.keep (0) must be at least 1"),
        (
            Train,
            {"steps": 1, "micro_batch_tokens": 0},
            "train.micro_batch_tokens (0) must be at least 1",
        ),
        (
            Train,
            {"steps": 10, "warmup_steps": 10},
            "train.warmup_steps (10) must be less than train.steps (10)",
        ),
    ],
)
def test_senseless_values(section: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        section(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("section", "given"),
    [
        (Data, {"train": "t", "max_length": 8}),
        (Quant, {"group_size": 16}),
        (Quant, {"format": None}),
        (Lora, {"rank": 1, "dropout": 0.0}),
        (Train, {"epochs": 0.5, "warmup_steps": 100}),
        (Train, {"steps": 10, "warmup_steps": 9}),
    ],
)
def test_values_at_the_limits(section: type, given: dict[str, Any]) -> None:
    made = section(**given)
    assert {name: getattr(made, name) for name in given} == given
