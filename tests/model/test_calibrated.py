"""The calibrated folder in the cache: its key, who makes it, and what is refused."""

from dataclasses import replace

import pytest
import torch

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.model import calibrated
from qtune.model.calibrated import (
    calibrated_folder,
    calibrated_place,
    is_calibrated,
    keep_beside,
)
from qtune.model.load import load_base
from qtune.model.prequantized import quantized_folder
from qtune.model.start import FILE
from qtune.quant.linear import QuantLinear
from qtune.recipe import Calibration, Lora, Quant

CPU = torch.device("cpu")
TEXT = Text([list(range(3, 40)), list(range(50, 80))], "rows")
GPTQ = {"method": "gptq", "rotate": True, "format": "int3", "group_size": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))


def make(recipe, text=TEXT, **options):
    from pathlib import Path

    return calibrated_folder(Path(recipe.model), recipe, lambda: text, device=CPU, **options)


def test_recipes_that_need_it(tiny_recipe):
    assert not is_calibrated(tiny_recipe())
    assert is_calibrated(tiny_recipe(quant={"method": "gptq"}))
    assert is_calibrated(tiny_recipe(lora={"init": "cloq"}))


def test_folder_is_loaded_as_it_is(tiny_recipe):
    recipe = tiny_recipe(quant=GPTQ, lora={"init": "cloq"})
    model = load_base(make(recipe), recipe.quant, device=CPU)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14
    assert all(m.storage.rotated and m.storage.format == "int3" for m in layers)
    assert not any(p.is_meta for p in model.parameters())


def test_it_is_made_once_and_again_when_something_changes(tiny_recipe, tiny_model, monkeypatch):
    made = []

    def run(job, folder):
        made.append(job)

    monkeypatch.setattr(calibrated.Job, "run", run)
    recipe = tiny_recipe(quant=GPTQ)
    first = make(recipe)
    assert make(recipe) == first and len(made) == 1
    # who chose the text does not matter, nor what is not asked for
    named = replace(recipe.quant, calibration=Calibration(text="other", tokens=99))
    assert make(replace(recipe, quant=named)) == first
    assert make(tiny_recipe(quant=GPTQ, lora={"rank": 2})) == first and len(made) == 1
    others = [
        make(recipe, Text(TEXT.rows[:1], "rows")),
        make(tiny_recipe(quant=GPTQ | {"method": "gptq", "rotate": False})),
        make(tiny_recipe(quant=GPTQ | {"calibration": Calibration(sequential=False)})),
        make(tiny_recipe(quant=GPTQ, lora={"init": "cloq"})),
        make(tiny_recipe(quant=GPTQ, lora={"init": "cloq", "rank": 2})),
        make(recipe, dtype=torch.float16),
    ]
    assert len({first, *others}) == 7 == len(made)
    assert calibrated_place(tiny_model, recipe, TEXT.sha256) == first


def test_others_wait_for_the_one_that_builds(tiny_recipe, tiny_model, monkeypatch):
    recipe = tiny_recipe(quant=GPTQ)
    waited = []
    monkeypatch.setattr(calibrated, "wait_for", lambda place: waited.append(place) or place)
    assert make(recipe, builds=False) == calibrated_place(tiny_model, recipe, TEXT.sha256)
    assert len(waited) == 1 and not waited[0].exists()


def test_quantized_folder_is_refused(tiny_recipe, tiny_model):
    quantized = quantized_folder(tiny_model, Quant(), device=CPU)
    with pytest.raises(UserError, match="is quantized already, so there are no weights"):
        make(tiny_recipe(model=str(quantized), quant={"method": "gptq"}))


def test_nothing_is_left_by_a_failure_but_finished_blocks(tiny_recipe, tmp_path, monkeypatch):
    def fail(job, folder):
        (folder / "half").touch()
        raise UserError("disk full")

    monkeypatch.setattr(calibrated.Job, "run", fail)
    with pytest.raises(UserError, match="disk full"):
        make(tiny_recipe(quant=GPTQ))
    assert not list((tmp_path / "cache").rglob("half"))


def test_what_is_told_is_kept_beside(tiny_recipe, tiny_model, tmp_path):
    folder = make(tiny_recipe(lora={"init": "cloq"}))
    places = tmp_path / "figures.json", tmp_path / "start.safetensors"
    keep_beside(folder, *places)
    assert places[0].read_bytes() == (folder / "calibration.json").read_bytes()
    assert places[1].read_bytes() == (folder / FILE).read_bytes()
    for place in places:
        place.unlink()
    keep_beside(tiny_model, *places)
    assert not any(place.exists() for place in places)


def test_settings_of_adapters_count_only_where_they_start_with_text(tiny_recipe, tiny_model):
    plain = tiny_recipe(quant=GPTQ)
    other = replace(plain, lora=Lora(rank=7))
    assert calibrated_place(tiny_model, plain, "0") == calibrated_place(tiny_model, other, "0")
