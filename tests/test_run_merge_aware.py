"""A merge-aware run from the recipe to what is served: one folder, which is the trained model."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune import cli, run_folder
from qtune.evaluate import compare
from qtune.model.adapt import load_trained
from qtune.model.load import load_base
from qtune.quant.linear import QuantLinear
from qtune.run_folder import RunFolder
from qtune.train.log import read_metrics

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).unsqueeze(0)


def recipe_text(model: Path, folder: Path) -> str:
    return f"""\
model: {model}
data:
  train: demo:train?rows=12
  validation: demo:validation?rows=4
  test: demo:test?rows=2
  max_length: 512
quant: {{format: nf4}}
lora: {{rank: 4, alpha: 8}}
train:
  steps: 4
  batch_size: 4
  lr: 1.0e-2
  eval_every: 2
  save_every: 2
  merge_aware: true
evaluate: {{metric: json_match, max_new_tokens: 2}}
merge: {{base: dequantized}}
export: [bf16, qtune]
run: {folder / "run"}
"""


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(recipe_text(tiny_model, folder))
    assert cli.main(["train", str(folder / "r.yaml")]) == 0
    return run_folder.open_run(folder / "run")


def logits(model: Callable[..., object]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits  # type: ignore[attr-defined]
    return found


def trained(run: RunFolder) -> torch.nn.Module:
    base = load_base(Path(run.recipe.model), run.recipe.quant, device=CPU)
    return load_trained(base, run.adapter)


def row(run: RunFolder, name: str) -> compare.Row:
    rows = {row.name: row for row in compare.read(run.path / "eval.json").rows}
    return rows[name]


def test_the_trained_model_is_what_training_measured_last(finished: RunFolder) -> None:
    last = [m for m in read_metrics(finished.path) if "held_out_loss" in m][-1]
    tuned = row(finished, "adapter on nf4").loss
    assert tuned == pytest.approx(last["held_out_loss"], rel=1e-4)
    assert tuned < row(finished, "base nf4").loss


def test_the_low_bit_export_is_one_folder_with_the_same_logits(finished: RunFolder) -> None:
    folder = finished.exports / "qtune"
    assert not (folder / "adapter").exists()
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(logits(exported), logits(trained(finished)))
    found = row(finished, "export qtune")
    assert found.exact and found.kl is not None and found.kl < 1e-6


def test_the_16_bit_export_holds_what_the_codes_stand_for(finished: RunFolder) -> None:
    stored = load_file(finished.exports / "bf16/model.safetensors")
    layers = {
        name.replace(".base_layer", ""): layer
        for name, layer in trained(finished).get_base_model().named_modules()  # type: ignore[operator]
        if isinstance(layer, QuantLinear)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(stored[f"{name}.weight"], layer.dequantize(torch.bfloat16))


def test_codes_moved_and_nothing_else(finished: RunFolder) -> None:
    model = trained(finished)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    served = {name: layer.weight.clone() for name, layer in layers.items()}
    scales = {name: layer.scale_codes.clone() for name, layer in layers.items()}
    with model.disable_adapter():  # type: ignore[operator]
        before = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert before.keys() == served.keys()
        assert any((before[name].weight != served[name]).any() for name in served)
        assert all(torch.equal(before[name].scale_codes, scales[name]) for name in served)


def test_the_plan_counts_the_codes(finished: RunFolder) -> None:
    plan = finished.read("plan.json")
    # beside those of the base, and a byte for the place of each original weight
    model = trained(finished)
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, QuantLinear))
    frozen = sum(p.nbytes for p in model.parameters())
    assert plan["memory"]["weights"] == frozen + packed + 2 * packed


def test_a_resumed_run_ends_with_the_same_bits(finished: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    again = run_folder.open_run(tmp_path / "run")
    shutil.rmtree(again.checkpoints / "step-000004")
    shutil.rmtree(again.adapter)
    recipe = str(tmp_path / "run/recipe.yaml")
    assert cli.main(["train", recipe, "--resume", f"run={tmp_path / 'run'}", "export=[]"]) == 0
    for file in ("adapter_model.safetensors", "codes.safetensors"):
        before, after = (load_file(run.adapter / file) for run in (finished, again))
        assert before.keys() == after.keys() and before
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("quant.format=null", "set quant.format"),
        ("adapter=scales", "set adapter: lora"),
        ("lora.dropout=0.1", "lora.dropout is not for"),
        ("lora.dora=true", "lora.dora is not for"),
        ("lora.experts=true", "lora.experts is not for"),
        ("lora.init=loftq", "lora.init: loftq"),
        ("train.parallel=fsdp", "write train.parallel: ddp"),
        ("train.merge_aware_from=1.0", r"must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny_model: Path,
    tmp_path: Path,
    change: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text(recipe_text(tiny_model, tmp_path))
    assert cli.main(["train", str(tmp_path / "r.yaml"), change, "export=[]"]) != 0
    pattern = " ".join(capsys.readouterr().err.split())
    assert re.search(reason, pattern), pattern
    assert not (tmp_path / "run").exists()
