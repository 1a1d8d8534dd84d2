import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from qtune.bench import Bench, weight_bytes
from qtune.data import encoded
from qtune.evaluate.generate import Answers
from qtune.model.load import load_base
from qtune.setup import open_setup

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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
    assert row.tokens == sum(sample.num_targets for sample in setup.data.held_out)


def test_a_changed_model_is_away_from_the_trained_one(tiny_recipe):
    bench, model, _ = make_bench(tiny_recipe())
    kept, _ = bench.measure("trained", "adapter", model, keep=True, size_bytes=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(30)
    row, _ = bench.measure("changed", "export", model, size_bytes=1)
    assert row.kl > 1e-3 and row.top1 < 1 and row.loss != kept.loss


def test_a_row_tells_how_far_it_is_from_the_trained_one(tiny_recipe):
    bench, model, _ = make_bench(tiny_recipe(evaluate={"metric": "json_fields"}))
    # as a tuned model answers
    answers = iter([bench.references, ["{}"] * len(bench.references)])
    bench._answers = lambda name, model: Answers(list(next(answers)), 5, 1.0)
    kept, _ = bench.measure("trained", "adapter", model, keep=True, size_bytes=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(30)
    row, _ = bench.measure("changed", "export", model, size_bytes=1)
    assert (kept.nats, kept.standard_error, kept.p_value) == (None, None, None)
    assert row.nats == pytest.approx(row.loss - kept.loss) and row.standard_error > 0
    assert (kept.exact_match, row.exact_match) == (1, 0)
    # two answers, both worse: one of the two even ways of four
    assert row.p_value == 0.5
    assert row.metric == "json_fields" and set(kept.fields.values()) == {1.0}
    assert set(row.fields.values()) == {0.0} and "amount" in row.fields
    assert bench.scores == {"trained": [1.0, 1.0], "changed": [0.0, 0.0]}


def test_tasks_text_and_prompts_of_the_recipe(tiny_recipe, tmp_path):
    (tmp_path / "text.txt").write_text("A text to be read.")
    (tmp_path / "prompts.txt").write_text("How far?\n")
    evaluate = {"perplexity": tmp_path / "text.txt", "prompts": tmp_path / "prompts.txt"}
    bench, model, setup = make_bench(tiny_recipe(evaluate=evaluate))
    row, _ = bench.measure("m", "base", model, size_bytes=1)
    assert row.text.bytes == 18 and list(bench.suite.answers) == ["m"]
    without = Bench(setup, suites=False)
    assert without.suite is None
    assert without.measure("m", "base", model, size_bytes=1)[0].text is None


def test_rows_are_as_many_as_the_recipe_says(tiny_recipe):
    bench, model, setup = make_bench(tiny_recipe(evaluate={"loss_rows": 1, "answer_rows": 1}))
    row, answers = bench.measure("m", "base", model, size_bytes=1)
    assert row.tokens == setup.data.held_out[0].num_targets
    assert len(answers.texts) == 1 and row.answers == 1
    assert bench.references == [setup.data.test[0].messages[-1]["content"]]


def test_of_a_pair_the_chosen_answer_is_measured(tiny_recipe, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": "good", "rejected": "not so good"} for i in range(4)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = {"train": str(path), "validation": str(path), "test": None}
    bench, model, setup = make_bench(tiny_recipe(data=data, train={"objective": "dpo"}))
    row, _ = bench.measure("m", "base", model, size_bytes=1)
    chosen = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    path.write_text("".join(json.dumps(answer) + "\n" for answer in chosen))
    alone, _, _ = make_bench(tiny_recipe(data=data))
    assert row.tokens == sum(sample.chosen().num_targets for sample in setup.data.held_out)
    assert row.loss == alone.measure("m", "base", model, size_bytes=1)[0].loss


def test_one_sample_per_row_gives_the_same_loss(tiny_recipe):
    bench, model, _ = make_bench(tiny_recipe())
    padded, _, _ = make_bench(tiny_recipe(data={"packing": False}))
    assert [batch.packing for batch in padded._batches] == [False]
    losses = [b.measure("m", "base", model, size_bytes=1)[0].loss for b in (bench, padded)]
    # the model computes in bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_stored_data_is_what_is_measured(tiny_recipe, monkeypatch):
    make_bench(tiny_recipe())

    def never(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoded, "encode", never)
    bench, model, _ = make_bench(tiny_recipe())
    assert bench.measure("m", "base", model, size_bytes=1)[0].loss > 0


def test_plain_texts_and_requests_with_tools_are_answered(tiny_recipe, tmp_path):
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools | tojson if tools else '' }}" + TEMPLATE)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "completion": "b"}, {"messages": said, "tools": [tool]}]
    paths = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for path, row in zip(paths, rows, strict=True):
        path.write_text(json.dumps(row))
    data = {"test": tuple(map(str, paths)), "template": str(template)}
    recipe = tiny_recipe(data=data, evaluate={"metric": "exact_match"})
    bench, model, setup = make_bench(recipe)
    row, answers = bench.measure("m", "base", model, size_bytes=1)
    assert row.answers == len(answers.texts) == 2 and bench.references == ["b", "b"]
    assert [r.plain for r in setup.data.test] == [True, False]


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
    (tmp_path / "model.gguf").write_bytes(b"1234")
    (tmp_path / "model.onnx").write_bytes(b"12")
    (tmp_path / "model.onnx.data").write_bytes(b"1")
    assert weight_bytes(tmp_path) == 15
