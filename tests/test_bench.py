import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from qtune.bench import Bench, weight_bytes
from qtune.model.load import load_base
from qtune.setup import open_setup


def make_bench(recipe):
    setup = open_setup(recipe, Accelerator())
    return Bench(setup), load_base(setup.base, None, device=torch.device("cpu")), setup


def test_a_model_measured_against_itself_is_the_same(tiny_recipe):
    bench, model, setup = make_bench(tiny_recipe())
    kept, answers = bench.measure("trained", "adapter", model, keep=True, size_bytes=1)
    row, again = bench.measure("same", "export", model, size_bytes=2, consumer="x", exact=True)
    assert (kept.kl, kept.top1) == (None, None)
    assert row.loss == kept.loss and row.kl == pytest.approx(0, abs=1e-5) and row.top1 == 1
    assert (row.name, row.kind, row.size_bytes, row.consumer) == ("same", "export", 2, "x")
    assert answers.texts == again.texts and row.answers == len(setup.data.test) == 2
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    assert row.tokens == sum(sum(sample.supervised) for sample in setup.data.held_out)


def test_a_changed_model_is_away_from_the_trained_one(tiny_recipe):
    bench, model, _ = make_bench(tiny_recipe())
    kept, _ = bench.measure("trained", "adapter", model, keep=True, size_bytes=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(30)
    row, _ = bench.measure("changed", "export", model, size_bytes=1)
    assert row.kl > 1e-3 and row.top1 < 1 and row.loss != kept.loss


def test_rows_are_as_many_as_the_recipe_says(tiny_recipe):
    bench, model, setup = make_bench(tiny_recipe(evaluate={"loss_rows": 1, "answer_rows": 1}))
    row, answers = bench.measure("m", "base", model, size_bytes=1)
    assert row.tokens == sum(setup.data.held_out[0].supervised)
    assert len(answers.texts) == 1 and row.answers == 1
    assert bench.references == [setup.data.test[0].messages[-1]["content"]]


def test_without_test_rows_there_are_no_answers(tiny_recipe):
    bench, model, _ = make_bench(tiny_recipe(data={"test": None}))
    row, answers = bench.measure("m", "base", model, size_bytes=1)
    assert answers is None and row.exact_match is None and row.tokens_per_s is None


def test_weight_bytes_are_those_of_all_weight_files(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"123")
    (tmp_path / "tokenizer.json").write_bytes(b"1234567")
    assert weight_bytes(tmp_path) == 8
