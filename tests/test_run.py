import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from qtune import cli, recipe_yaml, run, run_folder
from qtune.errors import UserError
from qtune.evaluate import compare
from qtune.train.log import read_metrics
from qtune.train.recompute import POLICIES

EVERY_EXPORT = ("adapter", "bf16", "bitsandbytes", "qtune")
# PEFT says so where the tied head is trained apart from the embedding, which the test wants
TIED = "ignore:Model has `tie_word_embeddings=True`:UserWarning"


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run with everything, by way of the command line."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(f"""\
model: {tiny_model}
data:
  train: demo:train?rows=12
  validation: demo:validation?rows=4
  test: demo:test?rows=3
  max_length: 512
lora: {{rank: 4, alpha: 8}}
train: {{steps: 4, batch_size: 4, lr: 1e-2, eval_every: 2, save_every: 2}}
evaluate: {{metric: json_match, max_new_tokens: 4}}
export: [adapter, bf16, bitsandbytes, qtune]
run: {folder / "run"}
""")
    assert cli.main(["train", str(folder / "r.yaml")]) == 0
    return run_folder.open_run(folder / "run")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run, for tests that change it."""
    shutil.copytree(finished.path, tmp_path / "run")
    return run_folder.open_run(tmp_path / "run")


def rows_of(folder):
    return {row.name: row for row in compare.read(folder.path / "eval.json").rows}


def test_a_run_leaves_what_every_stage_writes(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        *("recipe.yaml", "plan.json", "environment.json", "metrics.jsonl", "checkpoints"),
        "data.json",
        *("adapter", "eval.json", "samples.json", "merge.json", "export", "report.html"),
    }
    assert {path.name for path in finished.exports.iterdir()} == set(EVERY_EXPORT)
    hidden = [path for path in finished.path.rglob(".*") if path.name != ".gitattributes"]
    assert hidden == [], "temporary files are left"
    assert recipe_yaml.load(finished.path / "recipe.yaml") == finished.recipe
    steps = [m["step"] for m in read_metrics(finished.path) if "loss" in m]
    assert steps == [1, 2, 3, 4] and finished.read("plan.json")["steps"] == 4
    assert [p.name for p in sorted(finished.checkpoints.iterdir())] == [
        "step-000002",
        "step-000004",
    ]


def test_the_table_has_a_row_for_every_form_of_the_model(finished):
    rows = rows_of(finished)
    kinds = [row.kind for row in rows.values()]
    order = ["base", "quantized", "adapter", "merged", "export"]
    assert kinds == sorted(kinds, key=order.index)
    assert set(rows) >= {"base 16-bit", "base nf4", "adapter on nf4"}
    assert {f"export {name}" for name in EVERY_EXPORT} <= set(rows)
    table = compare.read(finished.path / "eval.json")
    loser = {"original": "dequantized", "dequantized": "original"}[table.merge.chosen]
    assert rows[f"merged onto {loser}"].kind == "merged"
    assert rows["export bf16"].loss <= rows[f"merged onto {loser}"].loss
    assert len({row.tokens for row in rows.values()}) == 1
    assert all(row.answers == 3 and row.size_bytes > 0 for row in rows.values())


def test_figures_of_the_table_agree(finished):
    rows = rows_of(finished)
    trained = rows["adapter on nf4"]
    last = [m for m in read_metrics(finished.path) if "held_out_loss" in m][-1]
    assert trained.loss == pytest.approx(last["held_out_loss"], rel=1e-3)
    assert trained.loss < rows["base nf4"].loss
    for name in ("bitsandbytes", "qtune"):
        assert rows[f"export {name}"].exact
        assert rows[f"export {name}"].loss == pytest.approx(trained.loss, rel=1e-3)
        assert rows[f"export {name}"].kl < 1e-4
    weights = finished.exports / "bf16/model.safetensors"
    assert rows["export bf16"].size_bytes == weights.stat().st_size


def test_the_planned_disk_is_enough(finished):
    written = sum(path.stat().st_size for path in finished.path.rglob("*.safetensors"))
    assert written < finished.read("plan.json")["disk_bytes"]


def test_the_adapter_loads_without_qtune(finished, tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, finished.adapter)
    saved = load_file(finished.adapter / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * 2 and all(t.dtype == torch.float32 for t in saved.values())
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        before = model(ids).logits
    assert not torch.equal(model(ids).logits, before)


def test_exports_bring_their_tokenizer_and_how_they_answer(finished):
    for name in EVERY_EXPORT:
        folder = finished.exports / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        golden = json.loads((folder / "qtune.json").read_text())["golden"][0]
        prompt = tokenizer.decode(golden["prompt_ids"])
        assert prompt.endswith("<|im_start|>assistant\n") and golden["greedy_ids"]


def test_stages_can_be_run_again(copied, capsys):
    before = rows_of(copied)
    (copied.path / "report.html").unlink()
    shutil.rmtree(copied.exports)
    assert cli.main(["export", str(copied.path), "--to", "qtune"]) == 0
    assert (copied.exports / "qtune/qtune.json").is_file()
    assert cli.main(["merge", str(copied.path)]) == 0
    assert [p.name for p in sorted(copied.exports.iterdir())] == ["bf16", "qtune"]
    assert cli.main(["eval", str(copied.path)]) == 0
    after = rows_of(copied)
    assert after.keys() == before.keys()
    for name, row in before.items():
        assert after[name].loss == pytest.approx(row.loss, rel=1e-3), name
    copied.report.unlink()
    assert cli.main(["report", str(copied.path)]) == 0
    assert copied.report.read_text().startswith("<!DOCTYPE html>")
    out = capsys.readouterr().out
    assert f"qtune chat {copied.path}" in out.replace("\n", "")


def test_resuming_a_finished_run_trains_no_more(finished, monkeypatch):
    weights = finished.adapter / "adapter_model.safetensors"
    lines, at = read_metrics(finished.path), weights.stat().st_mtime_ns
    monkeypatch.setattr(run, "fit", lambda *arguments: pytest.fail("it trains"))
    run.train(finished.recipe, resume=True)
    assert weights.stat().st_mtime_ns == at and read_metrics(finished.path) == lines


VARIANTS = {
    "16-bit": {"quant": {"format": None}, "export": ("adapter", "bf16")},
    "int8": {"quant": {"format": "int8"}, "export": ("bf16", "qtune")},
    "dora": {"lora": {"dora": True, "dropout": 0.1}, "export": ("adapter", "bf16")},
    "head": {"lora": {"modules_to_save": ("lm_head",)}, "export": ("adapter", "bf16", "qtune")},
    "cheap": {"train": {"recompute": "cheap"}},
    "all": {"train": {"recompute": "all"}},
    "own validation": {"data": {"validation": None, "test": None}},
    "no answers": {"evaluate": {"answer_rows": 0, "loss_rows": 1}},
    "merged": {"merge": {"quantized": "merged", "base": "original"}, "export": ("qtune", "bf16")},
}


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_export(tiny_recipe, variant):
    recipe = tiny_recipe(**VARIANTS[variant])
    run.train(recipe)
    folder = run_folder.open_run(recipe.run)
    losses = [m["loss"] for m in read_metrics(recipe.run) if "loss" in m]
    assert losses[-1] < losses[0]
    assert {path.name for path in folder.exports.iterdir()} == set(recipe.export)
    rows = rows_of(folder)
    trained = rows[f"adapter on {recipe.quant.format or '16-bit'}"]
    for name in recipe.export:
        # an adapter on the 16-bit base, and what was quantized anew, differ a little
        assert rows[f"export {name}"].loss == pytest.approx(trained.loss, rel=2e-2)
    assert (folder.path / "samples.json").exists() == bool(trained.answers)


def test_recomputation_changes_no_figure(tiny_recipe, tmp_path):
    losses = {}
    for policy in POLICIES:
        settings = {"recompute": policy, "eval_every": 0}
        recipe = tiny_recipe(train=settings, export=(), run=tmp_path / policy)
        run.train(recipe)
        planned = run_folder.open_run(recipe.run).read("plan.json")["recompute"]
        assert (planned["policy"], planned["reason"]) == (policy, "the recipe names it")
        losses[policy] = [m["loss"] for m in read_metrics(recipe.run) if "loss" in m]
    assert losses["none"] == losses["cheap"] == losses["all"]


def test_wandb_keeps_its_files_in_the_run_folder(tiny_recipe, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = tiny_recipe(log={"wandb": "tests"}, export=(), evaluate={"answer_rows": 0})
    run.train(recipe)
    (logged,) = (recipe.run / "wandb").glob("offline-run-*/run-*.wandb")
    content = logged.read_bytes()
    assert b"held_out_loss" in content and b"grad_norm" in content


@pytest.mark.parametrize("on_experts", [False, True])
def test_a_mixture_of_experts(tiny_recipe, tiny_model, tmp_path, on_experts):
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        max_position_embeddings=512,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, tmp_path / "moe")
    exports = ("bf16", "qtune") if on_experts else ("adapter", "bf16", "qtune")
    recipe = tiny_recipe(
        model=str(tmp_path / "moe"),
        lora={"experts": on_experts},
        export=exports,
        train={"steps": 4, "lr": 1e-2},
        evaluate={"answer_rows": 0},
    )
    run.train(recipe)
    folder = run_folder.open_run(recipe.run)
    plan = folder.read("plan.json")
    assert sum(".expert_" in layer["name"] for layer in plan["layers"]) == 2 * 2 * 4
    rows = {row["name"]: row for row in folder.read("eval.json")["rows"]}
    assert rows["adapter on nf4"]["loss"] < rows["base nf4"]["loss"]
    # the pair is the trained model, a merge onto its codes is it to bf16 rounding
    assert rows["export qtune"]["kl"] < 1e-3 and rows["export bf16"]["kl"] < 5e-2
    with pytest.raises(UserError, match="export bitsandbytes: its layout has no quantized"):
        run.export(folder, ("bitsandbytes",))
