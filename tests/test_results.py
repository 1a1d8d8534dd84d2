import json
from dataclasses import replace

import pytest
from accelerate import Accelerator

from qtune import run, run_folder
from qtune.evaluate import compare
from qtune.evaluate.compare import Row, Table
from qtune.results import NUM_SAMPLES, Results, asked_for
from qtune.setup import open_setup


@pytest.fixture
def trained(tiny_recipe):
    """A trained run, measured but not exported."""
    recipe = tiny_recipe(export=())
    run.train(recipe)
    return run_folder.open_run(recipe.run)


def opened(folder):
    return Results(folder, open_setup(folder.recipe, Accelerator()))


def names(folder):
    return [row.name for row in compare.read(folder.path / "eval.json").rows]


def test_samples_show_both_answers_to_the_same_request(trained):
    samples = trained.read("samples.json")
    test = open_setup(trained.recipe, Accelerator()).data.test
    assert len(samples) == len(test) <= NUM_SAMPLES
    for sample, row in zip(samples, test, strict=True):
        assert sample["prompt"] == row.messages[-2]["content"]
        assert sample["reference"] == row.messages[-1]["content"]
        assert sample["before"] != sample["reference"] and sample["correct_before"] is False
        assert isinstance(sample["after"], str)


def test_what_was_asked_last_is_shown():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    asked = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "b"}]
    assert [asked_for(asked[:n]) for n in (1, 2, 3)] == ["a", "a", "b"]


def test_each_row_is_written_as_soon_as_it_is_measured(trained):
    (trained.path / "eval.json").unlink()
    results = opened(trained)
    assert names(trained) == ["adapter on nf4"]
    results.measure_bases()
    assert names(trained) == ["base 16-bit", "base nf4", "adapter on nf4"]


def test_a_row_measured_again_takes_its_place(trained):
    results = opened(trained)
    results._put(replace(results.table.rows[0], loss=99.0))
    assert names(trained).count("base 16-bit") == 1
    assert compare.read(trained.path / "eval.json").rows[0].loss == 99.0


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_recipe_may_name_what_is_merged_onto(tiny_recipe, base):
    recipe = tiny_recipe(export=("bf16",), merge={"base": base})
    run.train(recipe)
    table = compare.read(recipe.run / "eval.json")
    assert table.merge.chosen == base
    assert [row.name for row in table.rows if row.kind in ("merged", "export")] == ["export bf16"]
    form = json.loads((recipe.run / "export/bf16/qtune.json").read_text())
    assert form["onto"] == base


def test_auto_takes_the_merge_with_the_lower_loss(trained, monkeypatch):
    results = opened(trained)
    losses = {"merged onto original": 2.0, "merged onto dequantized": 3.0}
    measure = results._bench.measure

    def measured(name, *arguments, **options):
        row, answers = measure(name, *arguments, **options)
        return replace(row, loss=losses[name]), answers

    monkeypatch.setattr(results._bench, "measure", measured)
    results.export(["bf16"])
    assert results.table.merge.chosen == "original"
    assert results.table.merge.why == "held-out loss 2.0000 onto original, 3.0000 onto dequantized"
    rows = {row.name: row for row in results.table.rows}
    assert rows["export bf16"].loss == 2.0 and rows["merged onto dequantized"].kind == "merged"
    assert "merged onto original" not in rows
    form = json.loads((trained.exports / "bf16/qtune.json").read_text())
    assert form["onto"] == "original"
    assert [path.name for path in trained.exports.iterdir()] == ["bf16"]


def test_rows_of_earlier_exports_stay(trained):
    path = trained.path / "eval.json"
    old = Row(
        name="export adapter", kind="export", loss=1.0, perplexity=2.7, tokens=9, size_bytes=1
    )
    table = compare.read(path)
    compare.write(Table(table.trained, [*table.rows, old], table.merge), path)
    run.evaluate(trained)
    assert names(trained)[-1] == "export adapter"


def test_keys_and_values_in_few_bits_are_measured_where_the_recipe_asks(tiny_recipe):
    recipe = tiny_recipe(export=(), evaluate={"kv_bits": 2})
    run.train(recipe)
    effect = compare.read(recipe.run / "eval.json").kv_cache
    assert effect.bits == 2 and effect.tokens > 0 and effect.kl > 0
    assert effect.cache_bytes < effect.cache_bytes_16bit


def test_too_little_text_for_that_is_said(tiny_recipe, monkeypatch, capsys):
    monkeypatch.setattr("qtune.results.long_rows", lambda texts, config: [])
    recipe = tiny_recipe(export=(), evaluate={"kv_bits": 8})
    run.train(recipe)
    assert compare.read(recipe.run / "eval.json").kv_cache is None
    assert "kv_bits: not measured" in capsys.readouterr().out
