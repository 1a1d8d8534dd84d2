"""Which exports hold trained scales."""

from pathlib import Path

import pytest

from qtune.errors import UserError
from qtune.export.exporter import check, exporter_names
from qtune.export.folder import scales
from qtune.export.folder.trained import Form
from qtune.recipe import Data, Merge, Quant, Recipe, Train


def recipe(adapter: str, **merge: str) -> Recipe:
    return Recipe(
        model="m",
        data=Data(train="d"),
        quant=Quant(format="nf4"),
        adapter=adapter,  # type: ignore[arg-type]
        train=Train(steps=1),
        merge=Merge(**merge),  # type: ignore[arg-type]
        run=Path("r"),
    )


# of those that take merged weights in 16 bits
DENSE = {"adapter", "adapter-gguf", "bf16", "fp16", "gguf-f16"}


def why_not(name: str, recipe: Recipe, form: Form) -> list[str]:
    return scales.why_not(name, recipe, form, quantizes=name not in DENSE)


@pytest.mark.parametrize("name", exporter_names())
def test_lora_goes_everywhere(name: str) -> None:
    assert why_not(name, recipe("lora"), "pair") == []


@pytest.mark.parametrize("adapter", ["scales", "lora + scales", "qa-lora"])
def test_what_holds_the_others(adapter: str) -> None:
    found = {name for name in exporter_names() if not why_not(name, recipe(adapter), "pair")}
    assert {"bf16", "qtune"} <= found and not {"adapter", "bitsandbytes"} & found
    # trained scales fit, zero points with an update in them do not
    assert ("gptq" in found) == (adapter != "qa-lora")


def test_only_onto_codes_and_with_them() -> None:
    assert "merge.base" in why_not("bf16", recipe("scales", base="original"), "pair")[0]
    assert "merge.quantized" in why_not("qtune", recipe("scales"), "merged")[0]


def test_a_run_is_told_before_it_trains() -> None:
    with pytest.raises(UserError, match="export adapter: what adapter: qa-lora trains belongs"):
        check(recipe("qa-lora"), ("adapter",))
