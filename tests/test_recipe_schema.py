"""Checking values against the dataclasses, and the JSON Schema."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args

import pytest

from qtune import recipe as recipe_module
from qtune.recipe import Data, ExportName, Lora, Recipe, Train
from qtune.recipe_schema import Mistake, json_schema, known_keys, validate

*FIRST, LAST = (f"'{name}'" for name in get_args(ExportName))
EXPORTS = f"{', '.join(FIRST)} or {LAST}"

GOOD: dict[str, Any] = {"model": "m", "data": {"train": "t"}, "train": {"steps": 9}, "run": "r"}


def mistakes(**changes: Any) -> list[Mistake]:
    found = validate({**GOOD, **changes})
    assert not isinstance(found, Recipe), found
    return found


def test_values_become_the_dataclasses_themselves() -> None:
    values = {**GOOD, "lora": {"target_modules": ["q", "k"], "alpha": 8}, "export": ["bf16"]}
    assert validate(values) == Recipe(
        model="m",
        data=Data(train="t"),
        train=Train(steps=9),
        run=Path("r"),
        lora=Lora(target_modules=("q", "k"), alpha=8.0),
        export=("bf16",),
    )


def test_an_int_may_stand_for_a_float() -> None:
    found = validate({**GOOD, "train": {"steps": 9, "lr": 1, "betas": [0, 0.5]}})
    assert isinstance(found, Recipe)
    assert isinstance(found.train.lr, float) and found.train.betas == (0.0, 0.5)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "lr", "2e-4", "expected a number, got the text '2e-4'; remove the quotes"),
        ("train", "lr", "fast", "expected a number, got the text 'fast'"),
        ("train", "lr", True, "expected a number, got true"),
        (
            "train",
            "lr",
            float("inf"),
            "expected a finite number; infinity and nan make no sense here",
        ),
        (
            "train",
            "lr",
            None,
            "expected a number, got nothing (null); give it a value or, for the default, "
            "remove the key",
        ),
        ("train", "steps", "10", "expected a whole number, got the text '10'; remove the quotes"),
        ("train", "steps", "1_000", "expected a whole number, got the text '1_000'; write 1000"),
        ("train", "steps", 10.0, "expected a whole number, got the number 10.0; write 10"),
        ("train", "steps", 10.5, "expected a whole number, got the number 10.5"),
        ("train", "steps", True, "expected a whole number, got true"),
        ("train", "steps", [1], "expected a whole number, got a list"),
        ("train", "betas", [0.9], "expected a list of 2 values, got 1"),
        ("train", "betas", [], "expected a list of 2 values, got 0"),
        ("train", "betas", [1, 1, 1], "expected a list of 2 values, got 3"),
        ("train", "betas", 0.9, "expected a list, got the number 0.9"),
        (
            "train",
            "schedule",
            "cosin",
            "expected 'cosine', 'linear', 'constant', 'wsd' or 'one_cycle', got the text 'cosin'; "
            "did you mean 'cosine'?",
        ),
        (
            "train",
            "schedule",
            1,
            "expected 'cosine', 'linear', 'constant', 'wsd' or 'one_cycle', got the number 1",
        ),
        ("data", "packing", "yes", "expected true or false, got the text 'yes'; write true"),
        ("data", "packing", "Off", "expected true or false, got the text 'Off'; write false"),
        (
            "data",
            "packing",
            "true",
            "expected true or false, got the text 'true'; remove the quotes",
        ),
        ("data", "packing", "perhaps", "expected true or false, got the text 'perhaps'"),
        ("data", "packing", 1, "expected true or false, got the number 1"),
        (
            "data",
            "train",
            3,
            "expected text or a mapping or a list, got the number 3; put it in quotes",
        ),
        ("quant", "skip", "lm_head", "expected a list, got the text 'lm_head'; write [lm_head]"),
        (
            "lora",
            "target_modules",
            3,
            "expected text or a list, got the number 3; put it in quotes",
        ),
        ("lora", "rank_pattern", [1], "expected a mapping, got a list"),
    ],
)
def test_wrong_values(section: str, key: str, value: Any, message: str) -> None:
    base = {"train": {"steps": 9}, "data": {"train": "t"}}.get(section, {})
    found = mistakes(**{section: {**base, key: value}})
    assert found == [Mistake((section, key), message, "value")]


@pytest.mark.parametrize(
    ("train", "keys", "message"),
    [
        (
            ["a", {"path": "b", "formt": "text"}],
            (1, "formt"),
            "unknown key 'formt' in 'data.train.1'; did you mean 'format'?",
        ),
        ({"rows": 3}, (), "missing key 'path' in 'data.train'; add `path:`"),
        ({"path": 3}, ("path",), "expected text, got the number 3; put it in quotes"),
        (["a", 3], (1,), "expected text or a mapping, got the number 3; put it in quotes"),
        ({"path": "a", "rows": 0}, (), "source.rows (0) must be at least 1"),
        ({"path": "a", "where": {"x": {}}}, ("where", "x"), "expected text or a whole number"),
        ({"path": "a", "format": "alpacca"}, ("format",), "did you mean 'alpaca'?"),
        ([], (), "data.train names no source"),
    ],
)
def test_mistakes_in_sources(train: Any, keys: tuple[str | int, ...], message: str) -> None:
    (found,) = mistakes(data={"train": train})
    at = ("data",) if found.about == "fields" and train == [] else ("data", "train", *keys)
    assert found.keys == at and message in found.message


def test_keys_of_an_inner_section() -> None:
    (found,) = mistakes(train={"steps": 9, "beta": 0.2})
    assert found.message == "unknown key 'beta' in 'train'; it belongs in 'train.preference'"
    assert "beta" in known_keys(("train", "preference"))
    assert "where" in known_keys(("data", "test", 0))


def test_wrong_values_inside_lists_and_mappings() -> None:
    found = mistakes(
        lora={"target_modules": ["q", 3], "rank_pattern": {"q": "8"}}, export=["bf16", "gguf"]
    )
    assert [(it.keys, it.message.split(";")[0]) for it in found] == [
        (("lora", "target_modules", 1), "expected text, got the number 3"),
        (("lora", "rank_pattern", "q"), "expected a whole number, got the text '8'"),
        (
            ("export", 1),
            f"expected {EXPORTS}, got the text 'gguf'",
        ),
    ]


def test_path_must_be_text() -> None:
    message = "expected text, got the number 4; put it in quotes"
    assert mistakes(run=4) == [Mistake(("run",), message, "value")]


@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_section_that_is_no_mapping(value: Any) -> None:
    (found,) = mistakes(lora=value)
    assert found.keys == ("lora",) and found.message.startswith("expected a mapping, got ")


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        (
            {"quant": {"groupsize": 64}},
            ("quant", "groupsize"),
            "unknown key 'groupsize' in 'quant'; did you mean 'group_size'?",
        ),
        (
            {"quant": {"zzz": 64}},
            ("quant", "zzz"),
            "unknown key 'zzz' in 'quant'; known are format, group_size, skip, layers, method, "
            "rotate, activations, outliers, calibration",
        ),
        ({"lr": 1}, ("lr",), "unknown key 'lr'; it belongs in 'train'"),
        ({"modle": 1}, ("modle",), "unknown key 'modle'; did you mean 'model'?"),
        (
            {"merge": {"seed": 1}},
            ("merge", "seed"),
            "unknown key 'seed' in 'merge'; it belongs at the top level",
        ),
    ],
)
def test_unknown_keys(changes: dict[str, Any], keys: tuple[str, ...], message: str) -> None:
    assert mistakes(**changes) == [Mistake(keys, message, "key")]


def test_missing_keys_quote_the_help_text() -> None:
    found = validate({"data": {}, "train": {"steps": 1}, "run": "r"})
    assert isinstance(found, list)
    assert [(it.keys, it.about) for it in found] == [((), "key"), (("data",), "key")]
    assert found[0].message.startswith("missing key 'model'; add `model:` (Base model: hub id,")
    assert found[1].message.startswith("missing key 'train' in 'data'; add `train:` (Training ")


def test_senseless_fields_are_told_in_the_recipes_words() -> None:
    assert mistakes(quant={"group_size": 48}) == [
        Mistake(
            ("quant",),
            "quant.group_size (48) must be a power of two, 16 or more, or row or tensor; try 64",
            "fields",
        )
    ]


def test_all_mistakes_at_once() -> None:
    found = mistakes(model=1, seed="x", lora={"rnak": 1, "dropout": "x"}, train={})
    assert {it.keys for it in found} == {
        ("model",),
        ("seed",),
        ("lora", "rnak"),
        ("lora", "dropout"),
        ("train",),
    }


def sections() -> list[type]:
    return [it for _, it in inspect.getmembers(recipe_module, dataclasses.is_dataclass)]


@pytest.mark.parametrize("section", sections(), ids=lambda it: it.__name__)
def test_schema_describes_every_field(section: type) -> None:
    schema = json_schema()
    node = schema if section is Recipe else schema["$defs"][section.__name__]
    assert node["additionalProperties"] is False
    assert list(node["properties"]) == [it.name for it in dataclasses.fields(section)]
    source = inspect.getsource(section)
    for name, entry in node["properties"].items():
        if "$ref" not in entry:
            assert f'    """{entry["description"]}"""' in source, name


def test_known_keys_carry_the_docstrings() -> None:
    keys = known_keys(("lora",))
    assert list(keys) == [field.name for field in dataclasses.fields(Lora)]
    assert keys["rank"] == "Rank of the update."
    assert "model" in known_keys(())
