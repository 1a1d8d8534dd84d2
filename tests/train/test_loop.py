import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qtune import recipe_yaml, run
from qtune.data.order import rows_of_step
from qtune.errors import UserError
from qtune.machine import Peak
from qtune.model.load import add_adapter, load_base
from qtune.run_folder import RunFolder
from qtune.setup import open_setup
from qtune.train import loop, state
from qtune.train.log import read_metrics

CPU = torch.device("cpu")


class StopsAfter(Peak):
    """Interrupts a training behind its n-th step, before that is logged."""

    def __init__(self, steps):
        super().__init__(CPU)
        self.left = steps

    def bytes(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().bytes()


def make_job(recipe, *, dtype=torch.bfloat16, peak=None):
    setup = open_setup(recipe, Accelerator())
    torch.manual_seed(recipe.seed)
    base = load_base(setup.base, recipe.quant, device=CPU, dtype=dtype)
    recipe.run.mkdir(exist_ok=True, parents=True)
    fresh = state.fresh(setup.data.train, 1)
    return loop.Job(
        recipe=recipe,
        model=add_adapter(base, recipe.lora),
        samples=setup.data.train,
        held_out=setup.data.held_out,
        num_steps=recipe.train.steps,
        folder=recipe.run,
        start=state.resumed(recipe.run / "checkpoints", fresh),
        peak=peak or Peak(CPU),
    )


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shaken(job):
    """The job with an adapter that does something: as it starts, B is zero."""
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return job


def figures(folder):
    """What metrics.jsonl says, clock and memory aside."""
    measured = {"seconds", "tokens_per_s", "peak_memory_bytes"}
    return [{k: v for k, v in m.items() if k not in measured} for m in read_metrics(folder)]


# dropout draws random numbers in every step
RANDOM = {"lora": {"dropout": 0.3}}


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tiny_recipe, tmp_path):
    recipe = tiny_recipe(**RANDOM, train={"steps": 6})
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
    last = [folder / "checkpoints/step-000006" for folder in (recipe.run, again.run)]
    assert same(*(load_file(folder / "optimizer.safetensors") for folder in last))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_draws_anew_in_every_step(tiny_recipe, dropout):
    # or the test above would prove nothing about random numbers
    job = shaken(make_job(tiny_recipe(lora={"dropout": dropout})))
    training = loop._Training(job, Accelerator())
    first, second = (training._accumulate(job.samples[:4]) for _ in range(2))
    assert (first == second) == (dropout == 0)


def test_resumes_after_sigkill(tiny_recipe, tmp_path):
    settings = {"steps": 16, "save_every": 1, "keep": 1}
    recipe = tiny_recipe(**RANDOM, train=settings, evaluate={"answer_rows": 0}, export=())
    whole = replace(recipe, run=tmp_path / "whole")
    run.train(whole)

    (tmp_path / "r.yaml").write_text(recipe_yaml.dump(recipe))
    command = [sys.executable, "-m", "qtune.cli", "train", str(tmp_path / "r.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(figures(recipe.run)) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    # a process that dies while it writes
    with (recipe.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')

    run.train(recipe, resume=True)
    assert figures(recipe.run) == figures(whole.run)
    adapters = [r.run / "adapter/adapter_model.safetensors" for r in (recipe, whole)]
    assert same(*map(load_file, adapters))


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_micro_batches_change_neither_loss_nor_gradient(tiny_recipe, tokens):
    recipe = tiny_recipe(train={"micro_batch_tokens": tokens})
    job = shaken(make_job(recipe, dtype=torch.float32))
    loss = loop._Training(job, Accelerator())._accumulate(job.samples[:4])
    expected, gradients = one_big_batch(job)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad.double() - gradients[name]).norm()
            assert error <= 1e-4 * gradients[name].norm(), name


def one_big_batch(job):
    """Mean loss over the first four samples' targets and its gradient, in float64, by padding."""
    base = AutoModelForCausalLM.from_pretrained(job.recipe.model, dtype=torch.float64)
    quantized = dict(job.model.get_base_model().named_modules())
    adapters = {}
    for name, layer in list(base.named_modules()):
        wrapper = quantized[name]
        if not hasattr(wrapper, "lora_A"):
            continue
        a, b = (m["default"].weight for m in (wrapper.lora_A, wrapper.lora_B))
        a, b = (t.detach().double().requires_grad_() for t in (a, b))
        adapters |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        weight = wrapper.get_base_layer().dequantize(torch.float64)
        layer.forward = lambda x, w=weight, a=a, b=b, s=wrapper.scaling["default"]: (
            x @ w.T + s * (x @ a.T) @ b.T
        )
    samples = job.samples[:4]
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in samples])
    targets = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        for at, supervised in enumerate(sample.supervised):
            targets[row, at] = ids[row, at] if supervised else -100
    logits = base(input_ids=ids, attention_mask=(ids >= 0).long()).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss.backward()
    prefix, suffix = "base_model.model.", ".default.weight"
    return loss.item(), {f"{prefix}{name}{suffix}": t.grad for name, t in adapters.items()}


def test_held_out_loss_is_that_of_transformers_on_single_samples(tiny_recipe):
    job = make_job(tiny_recipe(), dtype=torch.float32)
    loss, tokens = loop.held_out_loss(job.model, job.held_out, 400)
    total = 0.0
    for sample in job.held_out:
        labels = [
            i if supervised else -100
            for i, supervised in zip(sample.ids, sample.supervised, strict=True)
        ]
        with torch.no_grad():
            theirs = job.model(input_ids=torch.tensor([sample.ids]), labels=torch.tensor([labels]))
        total += theirs.loss.item() * sum(sample.supervised)
    assert tokens == sum(sum(sample.supervised) for sample in job.held_out)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_training_is_on_while_training_and_dropout_is_off_while_measuring(tiny_recipe):
    job = make_job(tiny_recipe(**RANDOM, train={"steps": 1}))
    before = loop.held_out_loss(job.model, job.held_out, 4096)
    assert before == loop.held_out_loss(job.model, job.held_out, 4096)
    job.model.eval()
    loop.train(job, Accelerator())
    assert all(module.training for module in job.model.modules())


def test_an_epoch_visits_every_sample_once(tiny_recipe):
    job = make_job(tiny_recipe(train={"batch_size": 4}))
    training = loop._Training(job, Accelerator())
    epochs = [
        Counter(s.row.number for step in steps for s in training._samples(step))
        for steps in (range(3), range(3, 6))
    ]
    assert epochs[0] == epochs[1] == Counter(s.row.number for s in job.samples)
    assert rows_of_step(12, 4, 0, 0) != rows_of_step(12, 4, 0, 3)


def test_a_batch_may_be_larger_than_the_data(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 1, "batch_size": 30})
    end = loop.train(make_job(recipe), Accelerator())
    job_tokens = [len(s.ids) for s in make_job(recipe).samples]
    assert 2 * sum(job_tokens) < end.tokens < 3 * sum(job_tokens)


def test_figures_of_a_run(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 5, "eval_every": 0, "save_every": 0}, log={"every": 2})
    job = make_job(recipe)
    end = loop.train(job, Accelerator())
    lines = read_metrics(recipe.run)
    assert [(m["step"], "held_out_loss" in m) for m in lines] == [
        (2, False),
        (4, False),
        (5, False),
        (5, True),
    ]
    assert lines[-2]["tokens"] == end.tokens and lines[-2]["seconds"] == end.seconds
    assert all(m["peak_memory_bytes"] >= 0 and m["tokens_per_s"] > 0 for m in lines[:-1])
    saved = [path.name for path in state.checkpoints(recipe.run / "checkpoints")]
    assert saved == ["step-000000", "step-000005"]


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
    assert set(bad["rows"]) <= {sample.row.place for sample in job.samples}
    assert same(trained(job.model), before)


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_adapter(tiny_recipe):
    job = make_job(tiny_recipe())
    before = trained(job.model)
    first = next(p for p in job.model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"norm of its gradient (nan|inf)"):
        loop.train(job, Accelerator())
    assert same(trained(job.model), before)


def test_two_processes_train_like_one(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"steps": 3}, evaluate={"answer_rows": 0}, export=())
    one = replace(recipe, run=tmp_path / "one")
    run.train(one)
    (tmp_path / "r.yaml").write_text(recipe_yaml.dump(recipe))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "-m", "qtune.cli", "train", str(tmp_path / "r.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1, done.stdout
    for ours, theirs in zip(figures(recipe.run), figures(one.run), strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-2)
    saved = RunFolder(recipe.run, recipe).checkpoints / "step-000002/rng.safetensors"
    assert len(load_file(saved)) == 2
