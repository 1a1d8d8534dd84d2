"""What integer containers ask of a recipe."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qtune.export.exporter import Trained
from qtune.export.folder.int_base import group_entry, merged_quant, why_not
from qtune.recipe import Merge, Quant, Recipe


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return replace(tiny_recipe(), quant=Quant(format="int4_sym"))


@pytest.mark.parametrize("group_size", [32, 64, 128, "row"])
def test_bases_that_kernels_know_pass(group_size: Any, recipe: Recipe) -> None:
    known = replace(recipe, quant=Quant(format="int4_sym", group_size=group_size))
    assert why_not(known, "pair", ("int4_sym",)) == []


@pytest.mark.parametrize(
    ("quant", "fix"),
    [
        (Quant(), "quant.format is nf4; set quant.format: int4_sym, or export the merged form"),
        (Quant(format=None), "quant.format is null"),
        (Quant(format="int4_sym", group_size=256), "256 is not one of 32, 64, 128, row; take 64"),
        (Quant(format="int4_sym", layers={"down_proj": "int8"}), "leave quant.layers out"),
        (Quant(format="int4_sym", method="gptq", rotate=True), "set quant.rotate: false"),
        (Quant(format="int4_sym", method="awq"), "set quant.method: gptq"),
        (Quant(format="int8", activations="int8"), "leave quant.activations out"),
    ],
)
def test_others_are_told_what_to_change(quant: Quant, fix: str, recipe: Recipe) -> None:
    odd = replace(recipe, quant=quant)
    formats: Any = ("int8",) if quant.activations else ("int4_sym", "int4")
    (problem,) = why_not(odd, "pair", formats)
    assert fix in problem
    assert why_not(odd, "merged", formats) == []


def test_merged_weights_keep_the_recipes_words_where_kernels_know_them(recipe: Recipe) -> None:
    quant = Quant(group_size=128, skip=("lm_head", "k_proj"))
    asked = replace(recipe, quant=quant, merge=Merge(method="nearest"))
    expected = Quant(format="int4", group_size=128, skip=("lm_head", "k_proj"), method="nearest")
    assert merged_quant(asked, "int4") == expected
    odd = replace(asked, quant=replace(quant, group_size=16))
    assert merged_quant(odd, "int4").group_size == 64


def test_a_row_is_one_group_of_minus_one(train: Callable[..., Trained]) -> None:
    trained = train(quant=Quant(format="int8", group_size="row"))
    assert group_entry(trained) == -1
    assert group_entry(replace(trained, recipe=replace(trained.recipe, quant=Quant()))) == 64
