import io

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from qtune import show
from qtune.evaluate.compare import Row, Table
from qtune.plan import make_plan
from qtune.run_folder import RunFolder
from qtune.setup import open_setup


@pytest.fixture
def screen(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    monkeypatch.setattr(show, "console", console)
    return out


def test_the_plan_in_words(tiny_recipe, screen):
    recipe = tiny_recipe(export=("adapter", "qtune"))
    setup = open_setup(recipe, Accelerator())
    made = make_plan(recipe, setup.base, setup.data.train, torch.device("cpu"))
    show.plan(made, setup)
    lines = dict(line.split(maxsplit=1) for line in screen.getvalue().splitlines())
    assert lines["layers"] == "14 in nf4, 1 in bfloat16"
    assert lines["model"].startswith(recipe.model)
    assert lines["data"].startswith("12 training rows of ") and "2 test requests" in lines["data"]
    assert lines["training"].startswith("4 steps of 4 samples")
    assert "are free" in lines["memory"] and lines["disk"].endswith(str(recipe.run))
    assert lines["recompute"].startswith("none: everything fits (none 0.00 GiB, cheap ")
    assert lines["time"] == "about 1 min of training" and lines["exports"] == "adapter, qtune"


def test_samples_mark_what_is_learned(tiny_recipe, screen):
    setup = open_setup(tiny_recipe(), Accelerator())
    show.samples(setup)
    text = screen.getvalue()
    for sample in setup.data.train[: show.NUM_SAMPLES]:
        assert f"‹{sample.row.messages[-1]['content']}<|im_end|>›" in text
        assert sample.row.place in text
    assert text.count("‹") == show.NUM_SAMPLES


def test_results_end_with_commands_that_can_be_copied(tiny_recipe, screen, tmp_path):
    folder = tmp_path / ("long" * 40) / "[red]"
    row = Row(name="base", kind="base", loss=1.0, perplexity=2.7, tokens=9, size_bytes=1)
    show.results(Table("base", [row]), RunFolder(folder, tiny_recipe(run=folder)))
    lines = screen.getvalue().splitlines()
    assert lines[-3:] == [
        f"  qtune chat {folder}",
        f"  qtune export {folder} --to bf16",
        f"  qtune eval {folder}",
    ]
