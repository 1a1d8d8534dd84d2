import io
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from qtune import show, show_data
from qtune.evaluate.compare import Row, Table
from qtune.plan import make_plan
from qtune.recipe_data import Source
from qtune.recipe_train import Preference
from qtune.run_folder import RunFolder
from qtune.setup import open_setup


@pytest.fixture
def screen(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    monkeypatch.setattr(show, "console", console)
    monkeypatch.setattr(show_data, "console", console)
    return out


@pytest.fixture
def shown(screen):
    """The lines of the plan of a recipe, by their first word."""

    def lines(recipe, **changes):
        setup = open_setup(recipe, Accelerator())
        made = make_plan(recipe, setup.base, setup.data.feed, torch.device("cpu"))
        show.plan(replace(made, **changes), setup)
        return dict(line.split(maxsplit=1) for line in screen.getvalue().splitlines())

    return lines


def test_the_plan_in_words(tiny_recipe, shown):
    recipe = tiny_recipe(export=("adapter", "qtune"))
    lines = shown(recipe)
    assert lines["layers"] == "14 in nf4, 1 in bfloat16"
    assert lines["model"].startswith(recipe.model)
    assert lines["data"].startswith("12 training rows of ") and "2 test requests" in lines["data"]
    assert "4 held out" in lines["data"] and "mix" not in lines
    assert lines["objective"] == "sft"
    assert lines["training"].startswith("4 steps of 4 samples") and lines["training"][-3:] == "cpu"
    assert lines["packing"].startswith("samples end to end in rows of at most 4096 tokens")
    assert lines["optimizer"] == "adamw, learning rate 0.01 (cosine)"
    assert "are free" in lines["memory"] and lines["disk"].endswith(str(recipe.run))
    assert lines["recompute"].startswith("none: everything fits (none 0.00 GiB, cheap ")
    assert lines["time"] == "about 1 min of training" and lines["exports"] == "adapter, qtune"


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("lora", "rank 4, "),
        ("scales", "scales and zero points at 2e-05, "),
        ("lora + scales", "rank 4, scales and zero points at 2e-05, "),
        ("qa-lora", "qa-lora of rank 4, "),
    ],
)
def test_what_is_trained_is_told(tiny_recipe, shown, adapter, words):
    quant, scales = {"format": "int4", "group_size": 32}, {"zeros": True}
    recipe = tiny_recipe(adapter=adapter, quant=quant, scales=scales, export=("qtune",))
    assert shown(recipe)["adapter"].startswith(words)


def test_options_that_are_set_are_told(tiny_recipe, shown):
    train = {"schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1, "ema_decay": 0.99}
    data = {
        "packing": False,
        "train": ("demo:train?rows=12", Source(path="demo:train?rows=8&seed=1", weight=36)),
    }
    lines = shown(tiny_recipe(train=train, data=data))
    assert lines["optimizer"] == (
        "adamw, learning rate 0.01 (linear after 2 of warm-up), weight_decay 0.1, ema_decay 0.99"
    )
    assert lines["packing"] == "off: one sample per row, at most 4096 tokens with padding"
    assert lines["mix"] == "25% demo:train?rows=12, 75% demo:train?rows=8&seed=1"


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("dpo", "dpo, beta 0.2, label_smoothing 0.1"),
        ("kto", "kto, beta 0.2, desirable_weight 1, undesirable_weight 1"),
        ("simpo", "simpo, beta 0.2, margin 0.5"),
        ("pretrain", "pretrain"),
    ],
)
def test_objectives_are_told_with_their_settings(tiny_recipe, objective, words):
    preference = Preference(beta=0.2, label_smoothing=0.1)
    recipe = tiny_recipe(train={"objective": objective, "preference": preference})
    assert show.objective(recipe.train) == words


def test_a_plan_for_devices_elsewhere(tiny_recipe, shown):
    changes = {"num_processes": 2, "expected_minutes": None, "matrix_flops_per_s": None}
    lines = shown(tiny_recipe(), **changes)
    assert lines["time"] == "unknown: the devices are not here"
    assert lines["training"].endswith(" on 2 devices (ddp)")
    assert " GiB on each device: " in lines["memory"]


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
