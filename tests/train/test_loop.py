import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from jobs import CPU, StopsAfter, figures, make_job, same, shaken, train_in_ranks, trained
from safetensors.torch import load_file

from qtune.errors import UserError
from qtune.interrupt import Interrupted
from qtune.machine import Peak
from qtune.train import loop, state
from qtune.train.log import read_metrics
from qtune.train.step import Passes

# dropout draws random numbers in every step
RANDOM = {"lora": {"dropout": 0.3}}
VARIANTS = {
    "packed": {},
    "padded": {"data": {"packing": False}},
    "accumulated": {"train": {"micro_batch_tokens": 1}},
    "average, best and spikes": {
        "train": {"ema_decay": 0.8, "keep_best": True, "patience": 9, "spike_factor": 4.0}
    },
    "noise": {"train": {"neftune_alpha": 5.0, "schedule": "wsd"}},
    "lion": {"train": {"optimizer": "lion", "lr": 1e-3, "lora_plus_ratio": 4.0}},
    "muon": {"train": {"optimizer": "muon"}},
    "adafactor": {"train": {"optimizer": "adafactor"}},
    "8 bits": {"train": {"optimizer": "adamw_8bit"}},
    "stream": {"data": {"streaming": True}},
    "dpo": {
        "data": {"train": "demo:train?rows=12&form=preference", "validation": None, "test": None},
        "train": {"objective": "dpo", "lr": 1e-3},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tiny_recipe, tmp_path, variant):
    fields = VARIANTS[variant]
    settings = {"steps": 6, **fields.get("train", {})}
    recipe = tiny_recipe(**RANDOM, **fields | {"train": settings})
    whole = make_job(recipe)
    loop.train(whole, Accelerator())

    again = replace(recipe, run=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_job(again, peak=StopsAfter(4)), Accelerator())
    assert [m["step"] for m in figures(again.run)] == [1, 2, 2, 3]
    resumed = make_job(again)
    assert resumed.start.step == 2
    end = loop.train(resumed, Accelerator())

    assert end.step == 6 and figures(again.run) == figures(recipe.run)
    assert same(trained(resumed.model), trained(whole.model))
    last, expected = (path / "checkpoints/step-000006" for path in (again.run, recipe.run))
    assert {path.name for path in last.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.safetensors"):
        assert same(load_file(last / path.name), load_file(path)), path.name


class SignalsItself(Peak):
    """Sends this process a signal in a certain step."""

    def __init__(self, step, number):
        super().__init__(CPU)
        self.left, self.number = step, number

    def bytes(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tiny_recipe, tmp_path, number):
    recipe = tiny_recipe(**RANDOM, train={"steps": 5, "eval_every": 3, "save_every": 0})
    whole = make_job(recipe)
    loop.train(whole, Accelerator())

    again = replace(recipe, run=tmp_path / "stopped")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as end:
        # it comes after the losses of step 2 were summed, so step 3 is the one that ends
        loop.train(make_job(again, peak=SignalsItself(2, number)), Accelerator())
    assert end.value.exit_code == 128 + number and signal.getsignal(number) == before
    saved = state.checkpoints(again.run / "checkpoints")
    assert [path.name for path in saved] == ["step-000000", "step-000003"]
    # what is due behind the step is left for later, and not forgotten
    assert [m["step"] for m in figures(again.run)] == [1, 2, 3]
    resumed = make_job(again)
    loop.train(resumed, Accelerator())
    assert figures(again.run) == figures(recipe.run)
    assert same(trained(resumed.model), trained(whole.model))


def test_a_run_killed_while_it_made_up_for_an_evaluation_logs_it_once(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 5, "eval_every": 3, "save_every": 0})
    with pytest.raises(Interrupted):
        loop.train(make_job(recipe, peak=SignalsItself(2, signal.SIGINT)), Accelerator())
    with pytest.raises(KeyboardInterrupt):
        loop.train(make_job(recipe, peak=StopsAfter(1)), Accelerator())
    loop.train(make_job(recipe), Accelerator())
    held_out = [m["step"] for m in read_metrics(recipe.run) if "held_out_loss" in m]
    assert held_out == [3, 5]


def test_an_epoch_visits_every_sample_once(tiny_recipe):
    job = make_job(tiny_recipe(train={"batch_size": 4}))
    epochs = [
        Counter(sample.place for step in steps for sample in job.feed.batch(step))
        for steps in (range(3), range(3, 6))
    ]
    assert epochs[0] == epochs[1] == Counter(sample.place for sample in job.feed.samples)


def test_a_batch_may_be_larger_than_the_data(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 1, "batch_size": 30})
    job = make_job(recipe)
    end = loop.train(job, Accelerator())
    tokens = sum(sample.num_tokens for sample in job.feed.samples)
    assert 2 * tokens < end.tokens < 3 * tokens


def test_figures_of_a_run(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 5, "eval_every": 0, "save_every": 0}, log={"every": 2})
    job = make_job(recipe, matrix_flops_per_s=1e12)
    end = loop.train(job, Accelerator())
    lines = read_metrics(recipe.run)
    assert [(m["step"], "held_out_loss" in m) for m in lines] == [
        (2, False),
        (4, False),
        (5, False),
        (5, True),
    ]
    assert lines[-2]["tokens"] == end.tokens and lines[-2]["seconds"] == end.seconds
    for line in lines[:-1]:
        assert line["peak_memory_bytes"] >= 0 and line["lr"] > 0 and line["grad_norm"] > 0
        assert line["tokens_per_s"] > line["supervised_tokens_per_s"] > 0
        assert 0 <= line["data_wait_share"] < 1 and 0 < line["mfu"] < 1
    assert lines[-1]["held_out_tokens"] == sum(s.num_targets for s in job.held_out)
    saved = [path.name for path in state.checkpoints(recipe.run / "checkpoints")]
    assert saved == ["step-000000", "step-000005"]


def test_figures_of_an_objective_are_logged_for_both_kinds_of_rows(tiny_recipe):
    recipe = tiny_recipe(**VARIANTS["dpo"] | {"train": {"objective": "dpo", "steps": 2}})
    loop.train(make_job(recipe), Accelerator())
    step, held_out = read_metrics(recipe.run)[-2:]
    assert {"rewards/chosen", "accuracy", "margin"} <= step.keys()
    assert {"held_out_rewards/chosen", "held_out_accuracy", "held_out_margin"} <= held_out.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_with_its_rows(tiny_recipe, value):
    job = make_job(tiny_recipe())
    before = trained(job.model)
    with torch.no_grad():
        job.model.get_base_model().model.norm.weight[0] = value
    with pytest.raises(UserError, match=r"step 1: the loss is .*bad_batch\.json"):
        loop.train(job, Accelerator())
    bad = json.loads((job.folder / "bad_batch.json").read_text())
    assert bad["step"] == 1 and len(bad["rows"]) == 4
    assert set(bad["rows"]) <= {sample.place for sample in job.feed.samples}
    assert same(trained(job.model), before)


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_adapter(tiny_recipe):
    job = make_job(tiny_recipe())
    before = trained(job.model)
    first = next(p for p in job.model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"norm of its gradient (nan|inf)"):
        loop.train(job, Accelerator())
    assert same(trained(job.model), before)


def test_a_spike_is_left_out(tiny_recipe):
    settings = {"steps": 12, "spike_factor": 3.0, "eval_every": 0, "schedule": "constant"}
    job = make_job(tiny_recipe(train={**settings, "max_grad_norm": None}))
    seen, first = [], next(p for p in job.model.parameters() if p.requires_grad)

    def spoil(gradient):
        seen.append(trained(job.model))
        return gradient * (1e6 if len(seen) == 11 else 1)

    first.register_hook(spoil)
    loop.train(job, Accelerator())
    lines = [m for m in read_metrics(job.folder) if "loss" in m]
    assert [m["num_spikes"] for m in lines] == [0] * 10 + [1, 1]
    assert same(seen[10], seen[11]) and not same(seen[9], seen[10])


def test_patience_ends_a_run_and_the_best_adapter_is_kept(tiny_recipe):
    settings = {"steps": 30, "eval_every": 1, "patience": 2, "keep_best": True}
    # so high a rate that the loss soon rises
    recipe = tiny_recipe(train={**settings, "lr": 3.0, "schedule": "constant", "save_every": 0})
    job = make_job(recipe)
    end = loop.train(job, Accelerator())
    losses = [m["held_out_loss"] for m in read_metrics(recipe.run) if "held_out_loss" in m]
    assert end.stopped and end.step == len(losses) < 30
    assert min(losses) == losses[-3] < min(losses[-2:])
    best = replace(recipe, run=Path(f"{recipe.run}-best"))
    again = make_job(best)
    loop.train(replace(again, num_steps=len(losses) - 2), Accelerator())
    assert same(trained(job.model), trained(again.model))
    # a run that has ended is not trained on
    assert loop.train(make_job(recipe), Accelerator()) == end


def test_the_average_is_measured_and_kept(tiny_recipe):
    recipe = tiny_recipe(train={"ema_decay": 0.7, "steps": 4})
    job = make_job(recipe)
    loop.train(job, Accelerator())
    last = recipe.run / "checkpoints/step-000004"
    raw, average = (load_file(last / f"{name}.safetensors") for name in ("adapter", "average"))
    kept = trained(job.model)
    assert not same(kept, raw) and all(torch.equal(kept[name], average[name]) for name in kept)
    runs = Passes(job.model, job.model, job.objective, recipe, Accelerator())
    found = read_metrics(recipe.run)[-1]["held_out_loss"]
    assert runs.measure(job.held_out).loss == found


def test_samples_are_logged_when_due(tiny_recipe):
    asked = []

    def answer(model):
        asked.append(model)
        return [{"prompt": "p", "answer": str(len(asked)), "expected": "e"}]

    job = make_job(tiny_recipe(train={"sample_every": 3}), answer=answer)
    loop.train(job, Accelerator())
    lines = [json.loads(line) for line in (job.folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["answer"]) for line in lines] == [(3, "1"), (4, "2")]
    assert asked == [job.model] * 2


def test_a_model_is_in_training_mode_while_it_trains(tiny_recipe):
    job = make_job(tiny_recipe(train={"steps": 1, "eval_every": 0}))
    job.model.eval()
    loop.train(job, Accelerator())
    assert all(module.training for module in job.model.modules())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_another_number_of_ranks_goes_on_to_rounding(tiny_recipe, tmp_path, capsys, parallel):
    settings = {"schedule": "constant", "lr": 1e-3, "ema_decay": 0.9, "parallel": parallel}
    begun = tiny_recipe(train={**settings, "steps": 2}, run=tmp_path / "begun")
    train_in_ranks(begun, 2)
    recipe = tiny_recipe(train={**settings, "steps": 4}, run=begun.run)
    loop.train(make_job(recipe, dtype=torch.float32), Accelerator())
    assert "written by 2 processes and goes on with 1" in capsys.readouterr().out
    whole = replace(recipe, run=tmp_path / "whole")
    loop.train(shaken(make_job(whole, dtype=torch.float32)), Accelerator())
    for found, expected in zip(figures(recipe.run), figures(whole.run), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
