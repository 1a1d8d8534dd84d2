"""Runs that train scales, scales and LoRA, or QA-LoRA: from the recipe to what is served."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune import cli, run_folder
from qtune.chat import open_partner
from qtune.evaluate import compare
from qtune.model.adapt import load_trained
from qtune.model.load import load_base
from qtune.quant.linear import QuantLinear
from qtune.run_folder import RunFolder
from qtune.train.log import read_metrics

CPU = torch.device("cpu")
KINDS = {"scales": "scales", "zeros": "scales", "both": "lora + scales", "qa": "qa-lora"}
IDS = torch.arange(5, 37).unsqueeze(0)


def recipe_text(model: Path, folder: Path, kind: str) -> str:
    zeros = "true" if kind == "zeros" else "false"
    return f"""\
model: {model}
data:
  train: demo:train?rows=12
  validation: demo:validation?rows=4
  test: demo:test?rows=2
  max_length: 512
quant: {{format: int4, group_size: 32}}
adapter: {KINDS[kind]}
lora: {{rank: 4, alpha: 8}}
scales: {{lr: 1.0e-3, zeros: {zeros}}}
train: {{steps: 4, batch_size: 4, lr: 1.0e-2, eval_every: 2, save_every: 2, keep_best: true}}
evaluate: {{metric: json_match, max_new_tokens: 2}}
export: [bf16, qtune]
run: {folder / "run"}
"""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def finished(kind: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(recipe_text(tiny_model, folder, kind))
    assert cli.main(["train", str(folder / "r.yaml")]) == 0
    return run_folder.open_run(folder / "run")


def rows_of(run: RunFolder) -> dict[str, compare.Row]:
    return {row.name: row for row in compare.read(run.path / "eval.json").rows}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def logits(model: Callable[..., object]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits  # type: ignore[attr-defined]
    return found


def trained(run: RunFolder) -> torch.nn.Module:
    base = load_base(Path(run.recipe.model), run.recipe.quant, device=CPU)
    return load_trained(base, run.adapter)


def test_the_run_folder_holds_what_was_trained(finished: RunFolder, kind: str) -> None:
    lora = load_file(finished.adapter / "adapter_model.safetensors")
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    if kind == "qa":
        assert not (finished.adapter / "scales.safetensors").exists()
        assert config["use_qalora"] and {t.shape[1] for n, t in lora.items() if "_A" in n} == {2, 4}
        return
    scales = load_file(finished.adapter / "scales.safetensors")
    assert {t.dtype for t in scales.values()} == {torch.float16}
    assert len(scales) == (28 if kind == "zeros" else 14)
    assert len(lora) == (28 if kind == "both" else 0) and config["r"] == (4 if lora else 0)


def test_training_makes_the_base_better(finished: RunFolder) -> None:
    rows = rows_of(finished)
    assert rows["adapter on int4"].loss < rows["base int4"].loss
    plan = finished.read("plan.json")
    assert plan["memory"]["adapter"] > 0 and plan["num_trained"] > 0


def test_what_training_measured_is_what_is_loaded(finished: RunFolder, kind: str) -> None:
    last = [m for m in read_metrics(finished.path) if "held_out_loss" in m][-1]
    found = rows_of(finished)["adapter on int4"].loss
    # the rounding of pooled inputs, which merged zero points do without
    tolerance = 2e-3 if kind == "qa" else 1e-4
    assert found == pytest.approx(last["held_out_loss"], rel=tolerance)


def test_the_low_bit_export_is_the_trained_model(finished: RunFolder, kind: str) -> None:
    folder = finished.exports / "qtune"
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    layers = [m for m in exported.modules() if isinstance(m, QuantLinear)]
    stored = {(layer.storage.scale_kind, layer.storage.zero_kind) for layer in layers}
    expected = {"zeros": ("half", "half"), "qa": ("linear", "float")}
    assert len(layers) == 14 and stored == {expected.get(kind, ("half", "codes"))}
    assert (folder / "adapter").is_dir() == (kind == "both")
    if kind != "both":
        assert torch.equal(logits(exported), logits(trained(finished)))
    row = rows_of(finished)["export qtune"]
    assert row.exact and row.kl is not None and row.kl < 1e-6


def test_the_16_bit_export_is_what_the_codes_stand_for(finished: RunFolder) -> None:
    table = compare.read(finished.path / "eval.json")
    assert table.merge is not None and table.merge.chosen == "dequantized"
    merged = AutoModelForCausalLM.from_pretrained(finished.exports / "bf16", dtype="auto")
    expected = logits(trained(finished))
    assert (logits(merged) - expected).norm() / expected.norm() < 0.02


def test_the_base_is_still_there(finished: RunFolder) -> None:
    base = load_base(Path(finished.recipe.model), finished.recipe.quant, device=CPU)
    expected = logits(base)
    model = load_trained(base, finished.adapter)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_a_resumed_run_ends_with_the_same_bits(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    again = run_folder.open_run(tmp_path / "run")
    shutil.rmtree(again.checkpoints / "step-000004")
    shutil.rmtree(again.adapter)
    recipe = str(tmp_path / "run/recipe.yaml")
    command = ["train", recipe, "--resume", f"run={tmp_path / 'run'}", "export=[]"]
    assert cli.main(command) == 0, capsys.readouterr().err
    before, after = tensors_of(finished.adapter), tensors_of(again.adapter)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_chat_opens_it(finished: RunFolder) -> None:
    partner = open_partner(str(finished.path), CPU, report=print)
    assert torch.equal(logits(partner.model), logits(trained(finished)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("export=[adapter]", "export adapter: what adapter: .* belongs to codes of the base"),
        ("export=[bitsandbytes]", "export bitsandbytes: .*trained ones are float16"),
        ("merge.base=original", "export bf16: .*set merge.base: dequantized"),
        ("merge.quantized=merged", "export qtune: .*set merge.quantized: pair"),
        ("lora.dora=true", "lora.dora goes by the length of frozen weights"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny_model: Path,
    tmp_path: Path,
    change: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text(recipe_text(tiny_model, tmp_path, "both"))
    assert cli.main(["train", str(tmp_path / "r.yaml"), change]) != 0
    found = capsys.readouterr().err
    assert re.search(reason, found), found
    assert not (tmp_path / "run").exists()
