from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from jobs import figures, make_job, shaken, train_in_ranks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qtune.train import loop
from qtune.train.step import Passes

FLOAT32_ROUNDING = 1e-5


def passes(job):
    return Passes(job.model, job.model, job.objective, job.recipe, Accelerator())


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_neither_loss_nor_gradient(tiny_recipe, tokens, packing):
    recipe = tiny_recipe(train={"micro_batch_tokens": tokens}, data={"packing": packing})
    job = shaken(make_job(recipe, dtype=torch.float32))
    means = passes(job).learn(job.feed.samples[:4])
    expected, gradients = one_big_batch(job)
    assert means.loss == pytest.approx(expected, rel=FLOAT32_ROUNDING)
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
    samples = job.feed.samples[:4]
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(4, longest, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        for at, supervised in enumerate(sample.supervised):
            targets[row, at] = ids[row, at] if supervised else -100
    logits = base(input_ids=ids, attention_mask=(ids >= 0).long()).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss.backward()
    prefix, suffix = "base_model.model.", ".default.weight"
    return loss.item(), {f"{prefix}{name}{suffix}": t.grad for name, t in adapters.items()}


def test_held_out_loss_is_that_of_transformers_on_single_samples(tiny_recipe):
    job = shaken(make_job(tiny_recipe(train={"micro_batch_tokens": 400}), dtype=torch.float32))
    means = passes(job).measure(job.held_out)
    total = 0.0
    for sample in job.held_out:
        ids = torch.tensor([list(sample.ids)])
        labels = ids.masked_fill(~torch.tensor([sample.supervised]), -100)
        with torch.no_grad():
            theirs = job.model(input_ids=ids, labels=labels)
        total += theirs.loss.item() * sum(sample.supervised)
    tokens = sum(sample.num_targets for sample in job.held_out)
    assert means.loss == pytest.approx(total / tokens, rel=FLOAT32_ROUNDING)


def test_dropout_draws_anew_in_every_pass_and_is_off_while_measuring(tiny_recipe):
    job = shaken(make_job(tiny_recipe(lora={"dropout": 0.3})))
    job.model.train()
    runs = passes(job)
    first, second = (runs.learn(job.feed.samples[:4]).loss for _ in range(2))
    assert first != second
    first, second = (runs.measure(job.held_out).loss for _ in range(2))
    assert first == second and job.model.training


FORMS = {"sft": "messages", "dpo": "preference", "orpo": "preference", "kto": "label"}


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_figures_do_not_depend_on_micro_batches(tiny_recipe, objective):
    found = []
    for tokens in (1, 100_000):
        settings = {"objective": objective, "micro_batch_tokens": tokens}
        recipe = tiny_recipe(data=in_form(FORMS[objective]), train=settings)
        job = shaken(make_job(recipe, dtype=torch.float32))
        means = passes(job).measure(job.held_out)
        assert means.figures.keys() == set(job.objective.figures)
        found.append([means.loss, *means.figures.values()])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


def test_noise_on_embeddings_is_for_learning_only(tiny_recipe):
    job = make_job(tiny_recipe(train={"neftune_alpha": 5.0}))
    job.model.train()
    runs = passes(job)
    first, second = (runs.learn(job.feed.samples[:4]).loss for _ in range(2))
    assert first != second
    quiet = make_job(tiny_recipe())
    assert runs.measure(job.held_out) == passes(quiet).measure(quiet.held_out)


def test_flags_come_back_summed(tiny_recipe):
    job = make_job(tiny_recipe())
    assert passes(job).learn(job.feed.samples[:2], lambda: (1.0, 0.0)).flags == [1.0, 0.0]


def in_form(form):
    return {
        "train": f"demo:train?rows=12&form={form}",
        "validation": f"demo:validation?rows=5&form={form}",
        "test": None,
    }


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_the_loss_curve_does_not_depend_on_how_a_batch_is_split(tiny_recipe, tmp_path, objective):
    settings = {"objective": objective, "steps": 4, "lr": 1e-3, "save_every": 0}
    recipe = tiny_recipe(data=in_form(FORMS[objective]), train=settings)
    # no group holds two samples, one holds all four, and two ranks hold two each
    curves = []
    for name, tokens in (("accumulated", 1), ("whole", 100_000)):
        split = replace(recipe.train, micro_batch_tokens=tokens)
        job = make_job(replace(recipe, run=tmp_path / name, train=split), dtype=torch.float32)
        loop.train(shaken(job), Accelerator())
        curves.append(figures(job.folder))
    curves.append(train_in_ranks(replace(recipe, run=tmp_path / "ranks"), 2))
    for curve in curves[1:]:
        for line, expected in zip(curve, curves[0], strict=True):
            assert line == pytest.approx(expected, rel=FLOAT32_ROUNDING, abs=1e-5)
