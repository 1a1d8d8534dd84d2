"""When a training looks through codes, and that what is measured and kept is what is served."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from jobs import CPU, StopsAfter, figures, make_job, same, trained

from qtune.model import served_codes
from qtune.model.adapt import adapt, quant_lora_layers
from qtune.model.load import load_base
from qtune.recipe import Quant
from qtune.train import loop
from qtune.train.merging import Merging

INT4 = Quant(format="int4", group_size=32)
AWARE = {"merge_aware": True, "merge_aware_from": 0.5}


def job_of(recipe, **options):
    """A job as `run` makes it of a merge-aware recipe."""
    accelerator = Accelerator()
    job = make_job(recipe, accelerator, **options)
    base = load_base(Path(recipe.model), recipe.quant, device=CPU)
    torch.manual_seed(recipe.seed)
    model = adapt(base, recipe)
    served_codes.take_originals(model, Path(recipe.model))
    return replace(job, model=model)


def codes_of(model):
    return {name: layer.merge_aware.codes.clone() for name, layer in quant_lora_layers(model)}


def serves(model):
    return {layer.served is not None for _, layer in quant_lora_layers(model)}


def test_it_sets_in_after_its_share_of_the_steps(tiny_recipe):
    recipe = tiny_recipe(quant=INT4, train=AWARE)
    job = job_of(recipe)
    merging = Merging(job.model, recipe.train, 7)
    seen = []
    for step in range(7):
        merging.begin(step)
        seen.append(serves(job.model))
    # half of seven steps, rounded down, are plain
    assert seen == [{False}] * 3 + [{True}] * 4
    with merging.measured():
        assert serves(job.model) == {True}


def test_measured_is_the_served_model_from_the_first_step_on(tiny_recipe):
    recipe = tiny_recipe(quant=INT4, train={**AWARE, "steps": 4, "eval_every": 1})
    job = job_of(recipe)
    loop.train(job, Accelerator())
    served = codes_of(job.model)
    served_codes.renew(job.model)
    assert same(codes_of(job.model), served) and serves(job.model) == {True}
    lines = [line for line in figures(recipe.run) if "held_out_loss" in line]
    passes = loop.Passes(job.model, job.model, job.objective, recipe, Accelerator())
    assert passes.measure(job.held_out).loss == lines[-1]["held_out_loss"]
    # what nobody serves has another loss
    served_codes.serve(job.model, False)
    assert passes.measure(job.held_out).loss != lines[-1]["held_out_loss"]


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.8, "keep_best": True}], ids=["plain", "ema"]
)
def test_a_resumed_training_ends_with_the_same_codes(tiny_recipe, tmp_path, options):
    settings = {**AWARE, "steps": 6, "save_every": 2, "eval_every": 2, **options}
    recipe = tiny_recipe(quant=INT4, train=settings)
    whole = job_of(recipe)
    loop.train(whole, Accelerator())

    again = replace(recipe, run=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        # behind the step with which codes set in
        loop.train(job_of(again, peak=StopsAfter(5)), Accelerator())
    resumed = job_of(again)
    assert resumed.start.step == 4
    loop.train(resumed, Accelerator())
    assert figures(again.run) == figures(recipe.run)
    assert same(trained(resumed.model), trained(whole.model))
    assert same(codes_of(resumed.model), codes_of(whole.model))


def test_the_best_is_put_back_with_its_codes(tiny_recipe):
    settings = {**AWARE, "steps": 6, "eval_every": 1, "keep_best": True, "lr": 0.1}
    recipe = tiny_recipe(quant=INT4, train={**settings, "schedule": "constant"})
    job = job_of(recipe)
    loop.train(job, Accelerator())
    losses = [m["held_out_loss"] for m in figures(recipe.run) if "held_out_loss" in m]
    assert losses[-1] > min(losses)
    passes = loop.Passes(job.model, job.model, job.objective, recipe, Accelerator())
    assert passes.measure(job.held_out).loss == min(losses)


def test_without_the_word_nothing_changes(tiny_recipe):
    recipe = tiny_recipe()
    job = make_job(recipe)
    merging = Merging(job.model, recipe.train, 4)
    merging.begin(3)
    merging.finish()
    assert all(layer.merge_aware is None for _, layer in quant_lora_layers(job.model))
