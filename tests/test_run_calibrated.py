"""Runs whose base is calibrated and whose adapter starts with what that could not keep."""

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from qtune import chat, cli, run, run_folder
from qtune.errors import UserError
from qtune.evaluate import compare
from qtune.model.calibration.job import Job
from qtune.model.load import load_base
from qtune.model.sharded import load_adapted
from qtune.recipe import Calibration
from qtune.setup import open_setup, stored_base

EXPORTS = ("adapter", "bf16", "qtune")


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run by way of the command line, with a cache of its own."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "r.yaml").write_text(f"""\
model: {tiny_model}
data:
  train: demo:train?rows=12
  validation: demo:validation?rows=4
  test: demo:test?rows=1
  max_length: 512
quant: {{format: int3, group_size: 32, calibration: {{tokens: 400, length: 128}}}}
lora: {{rank: 4, alpha: 8}}
train: {{steps: 4, batch_size: 4, lr: 1e-3, eval_every: 2, save_every: 2}}
evaluate: {{metric: json_match, max_new_tokens: 2}}
export: [{", ".join(EXPORTS)}]
run: {folder / "run"}
""")
    words = ["quant.method=gptq", "quant.rotate=true", "lora.init=cloq"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(folder / "cache"))
        assert cli.main(["check", str(folder / "r.yaml"), *words]) == 0
        assert not list((folder / "cache").glob("models/*")), "check has calibrated"
        assert cli.main(["train", str(folder / "r.yaml"), *words]) == 0
    return run_folder.open_run(folder / "run")


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of that run and its cache, for tests that change them."""
    shutil.copytree(finished.path, tmp_path / "run")
    shutil.copytree(finished.path.parent / "cache", tmp_path / "cache")
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    return run_folder.open_run(tmp_path / "run")


@pytest.fixture
def no_calibration(monkeypatch):
    def refuse(job, folder):
        pytest.fail("calibrated again")

    monkeypatch.setattr(Job, "run", refuse)


def table(folder):
    return {row.name: row for row in compare.read(folder.path / "eval.json").rows}


def test_the_run_tells_how_its_base_was_made(finished):
    figures = finished.read("calibration.json")
    assert (figures["text"], figures["tokens"], figures["method"]) == ("train", 400, "gptq")
    assert len(figures["layers"]) == 14
    assert finished.start.is_file()


def test_every_form_is_measured_and_what_should_be_exact_is(finished):
    rows = table(finished)
    assert {"base int3", "adapter on int3", *(f"export {name}" for name in EXPORTS)} <= set(rows)
    assert rows["export qtune"].exact
    assert rows["export qtune"].loss == pytest.approx(rows["adapter on int3"].loss, abs=1e-4)
    # of the original weights the adapter changes only what was learned
    for name in ("export adapter", "export bf16"):
        assert rows[name].loss == pytest.approx(rows["adapter on int3"].loss, abs=0.05)


def test_training_begins_with_the_start(finished, tiny_model, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(finished.path.parent / "cache"))
    setup = open_setup(finished.recipe, Accelerator())
    model = load_adapted(stored_base(setup, finished), finished.recipe, Accelerator())
    ids = torch.tensor([setup.data.held_out[0].ids])
    with torch.no_grad():
        truth = load_base(tiny_model, None, device=torch.device("cpu"))(ids).logits
        begun = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert (begun - truth).norm() < 0.9 * (base - truth).norm()


def test_the_plan_knows_the_bytes_of_every_layer(finished):
    planned = {layer["name"]: layer for layer in finished.read("plan.json")["layers"]}
    folders = (finished.path.parent / "cache/models").glob("llama-int3-gptq-*/model.safetensors")
    (weights,) = folders
    sizes: dict[str, int] = {}
    for name, tensor in load_file(weights).items():
        sizes[name.rpartition(".")[0]] = sizes.get(name.rpartition(".")[0], 0) + tensor.nbytes
    layers = {name for name in planned if name in sizes}
    assert len(layers) == 14
    assert all(planned[name]["size_bytes"] == sizes[name] for name in layers)
    assert all(planned[name]["format"] == "int3" for name in layers)


def test_resuming_takes_the_same_base(copied, no_calibration):
    recipe = replace(copied.recipe, run=copied.path)
    shutil.rmtree(copied.adapter)
    before = (copied.path / "checkpoints").iterdir()
    assert list(before)
    run.train(recipe, resume=True, allow=["run"])
    assert copied.adapter.is_dir()


def test_other_data_later_changes_nothing_while_the_base_is_there(copied, no_calibration):
    data = replace(copied.recipe.data, train="demo:train?rows=10")
    changed = run_folder.RunFolder(copied.path, replace(copied.recipe, data=data))
    loss = table(copied)["base int3"].loss
    run.evaluate(changed)
    assert table(copied)["base int3"].loss == pytest.approx(loss, abs=1e-6)


def test_base_that_is_gone_is_made_again_from_the_same_text(copied, tmp_path):
    loss = table(copied)["base int3"].loss
    shutil.rmtree(tmp_path / "cache/models")
    run.evaluate(copied)
    assert table(copied)["base int3"].loss == pytest.approx(loss, abs=1e-6)


def test_base_that_is_gone_is_not_made_from_another_text(copied, tmp_path):
    shutil.rmtree(tmp_path / "cache/models")
    data = replace(copied.recipe.data, train="demo:train?rows=10")
    changed = run_folder.RunFolder(copied.path, replace(copied.recipe, data=data))
    with pytest.raises(UserError, match=r"calibration\.text: train\) has changed since"):
        run.evaluate(changed)


def test_chat_takes_the_base_of_the_run(copied, tmp_path, no_calibration):
    partner = chat.open_partner(str(copied.path), torch.device("cpu"), report=print)
    layer = partner.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.storage.rotated and layer.storage.format == "int3"
    shutil.rmtree(tmp_path / "cache/models")
    with pytest.raises(UserError, match=r"is not in the cache any more; `qtune eval .*run` makes"):
        chat.open_partner(str(copied.path), torch.device("cpu"), report=print)


def test_missing_text_is_named_by_check(tiny_recipe):
    settings = Calibration(text="nowhere/text.txt")
    recipe = tiny_recipe(quant={"method": "gptq", "calibration": settings})
    with pytest.raises(UserError, match=r"nowhere/text\.txt cannot be read"):
        run.check(recipe)
