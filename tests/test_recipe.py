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
        (Quant, {"group_size": 48}, "quant.group_size (48) must be a power of two, 16 or more"),
        (Quant, {"group_size": 8}, "quant.group_size (8) must be a power of two, 16 or more"),
        (Quant, {"group_size": 0}, "quant.group_size (0) must be a power of two, 16 or more"),
        (Quant, {"group_size": -64}, "quant.group_size (-64) must be a power of two, 16 or more"),
        (Lora, {"rank": 0}, "lora.rank (0) must be at least 1"),
        (Lora, {"dropout": 1.0}, "lora.dropout (1.0) must be in [0, 1)"),
        (Lora, {"dropout": -0.1}, "lora.dropout (-0.1) must be in [0, 1)"),
        (Lora, {"dora": True, "init": "cloq"}, "lora.dora is not for lora.init: cloq"),
    ],
)
def test_senseless_values(section: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        section(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("section", "given"),
    [
        (Quant, {"group_size": 16}),
        (Quant, {"format": None}),
        (Lora, {"rank": 1, "dropout": 0.0}),
        (Evaluate, {"answer_rows": 0, "loss_rows": 1}),
    ],
)
def test_values_at_the_limits(section: type, given: dict[str, Any]) -> None:
    made = section(**given)
    assert {name: getattr(made, name) for name in given} == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed (-1) must be at least 0"),
        (
            {
                "data": Data(train="t", validation="v", streaming=True),
                "train": Train(epochs=1),
            },
            "data.streaming needs train.steps",
        ),
        ({"data": Data(train="t", overlong="split")}, "data.overlong: split is for train.object"),
        ({"train": Train(steps=1, sample_every=1)}, "train.sample_every needs data.test"),
        (
            {"quant": Quant(format=None), "lora": Lora(init="loftq")},
            "lora.init: loftq makes up for what quantization loses; set quant.format",
        ),
    ],
)
def test_sections_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe(**changes)
    assert message in str(raised.value)
