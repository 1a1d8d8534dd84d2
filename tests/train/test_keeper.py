from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from jobs import make_job, same, trained
from safetensors.torch import load_file

from qtune.errors import UserError
from qtune.train import state
from qtune.train.keeper import Keeper, check_adapter
from qtune.train.optim import make_optimizer


def keeper(job):
    folder = job.folder / "checkpoints"
    optimizer = make_optimizer(job.model, job.recipe.train)
    return Keeper(folder, job.model, optimizer, job.recipe, Accelerator())


def moved(job, value):
    with torch.no_grad():
        for parameter in trained_parameters(job):
            parameter.fill_(value)


def trained_parameters(job):
    return [p for p in job.model.parameters() if p.requires_grad]


def values(job):
    return {float(p.detach().mean()) for p in trained_parameters(job)}


def test_without_options_the_last_adapter_is_kept(tiny_recipe):
    job = make_job(tiny_recipe())
    kept = keeper(job)
    kept.keep_best()
    before = trained(job.model)
    kept.put_kept()
    assert same(trained(job.model), before)
    kept.save(job.start)
    saved = state.place(job.folder / "checkpoints", 0)
    names = {path.name for path in saved.glob("*.safetensors")}
    assert names == {"adapter.safetensors", "optimizer.safetensors", "rng.safetensors"}


def test_the_best_survives_a_resume(tiny_recipe):
    job = make_job(tiny_recipe(train={"keep_best": True}))
    first = keeper(job)
    moved(job, 1.0)
    first.keep_best()
    moved(job, 2.0)
    now = replace(job.start, step=3)
    first.save(now)
    again = keeper(job)
    moved(job, 9.0)
    again.restore(now)
    assert values(job) == {2.0}
    again.put_kept()
    assert values(job) == {1.0}


def test_the_average_is_measured_saved_and_kept(tiny_recipe):
    job = make_job(tiny_recipe(train={"ema_decay": 0.5, "keep_best": True}))
    kept = keeper(job)
    for value in (0.0, 3.0):
        moved(job, value)
        kept.stepped()
    # of two states with a decay of a half, the last counts twice
    with kept.measured():
        assert values(job) == {2.0}
    assert values(job) == {3.0}
    kept.keep_best()
    now = replace(job.start, step=2)
    kept.save(now)
    saved = load_file(state.place(job.folder / "checkpoints", 2) / "average.safetensors")
    assert {float(t.mean()) for t in saved.values() if t.ndim} == {2.0}
    again = keeper(job)
    again.restore(now)
    moved(job, 9.0)
    again.put_kept()
    assert values(job) == {2.0}


def test_before_the_first_step_dropout_is_seeded(tiny_recipe):
    job = make_job(tiny_recipe(seed=5))
    keeper(job).restore(job.start)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_another_adapter_is_named(tiny_recipe):
    job = make_job(tiny_recipe())
    now = replace(job.start, step=1)
    keeper(job).save(now)
    wider = make_job(tiny_recipe(lora={"rank": 8}))
    with pytest.raises(UserError, match=r"step-000001 holds another adapter: .*lora_A.* differ"):
        check_adapter(job.folder / "checkpoints", now, wider.model)
    check_adapter(job.folder / "checkpoints", now, job.model)
    check_adapter(job.folder / "checkpoints", job.start, wider.model)
