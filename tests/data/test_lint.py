from dataclasses import replace

import pytest

from qtune.data.chat import encode
from qtune.data.lint import Lint
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.recipe import Data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("chatml", "headers", "gemma", "inst", "end_once", "markers", "thinking")


def settings(**options):
    return Data(train="x", **{"max_length": 500, **options})


@pytest.fixture
def problems():
    """What is found in a row encoded with a tokenizer: place, problem, whether fatal."""

    def find(tokenizer, row, samples=None, **options):
        if samples is None:
            samples = encode(tokenizer, row, settings=settings(**options))
        found = Lint(tokenizer).findings(row, samples)
        return [(finding.place, finding.problem, finding.fatal) for finding in found]

    return find


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_good_samples_have_no_findings(family, train_on, tokenizers, row, problems):
    example = row("Hi", "Hello!", "2+2?", "It is 4.")
    assert problems(tokenizers[family], example, train_on=train_on) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_good_pairs_and_texts_have_no_findings(family, tokenizers, row, problems):
    pair = replace(row("Hi", "Hello!"), rejected=row("Hi", "Go away.").messages)
    text = Row("t", 1, [{"role": "assistant", "content": "It is four."}], plain=True)
    assert problems(tokenizers[family], pair) == problems(tokenizers[family], text) == []


def test_nothing_learned(tokenizers, row, problems):
    silent = Sample("x:1", [40, 41], [0.0, 0.0])
    tokenizer = tokenizers["chatml"]
    expected = [("x:1", "no token would be learned", True)]
    assert problems(tokenizer, row("a", "b"), [silent]) == expected


def test_nothing_learned_because_the_answer_was_cut(tokenizers, row, problems):
    options = {"max_length": 8, "overlong": "truncate"}
    ((_, problem, fatal),) = problems(tokenizers["chatml"], row("a b c d e f g h", "d"), **options)
    assert fatal and problem.startswith("no token would be learned (")
    assert problem.endswith(
        " tokens were cut); raise data.max_length, or leave such rows out with data.overlong: drop"
    )


def test_end_of_turn_not_learned(tokenizers, row, problems):
    sample = Sample("x:1", tokenizers["chatml"]("a b.").input_ids, [0.0, 0.0, 1.0, 1.0])
    ((_, problem, fatal),) = problems(tokenizers["chatml"], row("a", "b"), [sample])
    assert problem == "the end of the turn would not be learned (the last target is '.')" and fatal


def test_each_part_of_a_pair_is_looked_at(tokenizers, row, problems):
    tokenizer = tokenizers["chatml"]
    good = encode(tokenizer, row("a", "b"), settings=settings())[0]
    bad = replace(good, ids=good.ids[:-2], weights=good.weights[:-2])
    ((_, problem, _),) = problems(tokenizer, row("a", "b"), [replace(good, rejected=bad)])
    assert problem.startswith("the end of the turn would not be learned")


def test_a_cut_sample_is_noted_and_its_end_not_missed(tokenizers, row, problems):
    options = {"max_length": 20, "overlong": "truncate"}
    ((_, problem, fatal),) = problems(tokenizers["chatml"], row("a", "b " * 30), **options)
    assert problem.startswith("cut at data.max_length, without its last ") and not fatal


def test_a_row_left_out_is_noted(tokenizers, row, problems):
    options = {"max_length": 20, "overlong": "drop"}
    expected = [("train.jsonl:1", "left out: longer than data.max_length", False)]
    assert problems(tokenizers["chatml"], row("a", "b " * 30), **options) == expected


def test_only_the_last_piece_of_a_text_has_an_end(tokenizers, problems):
    text = Row("t", 1, [{"role": "assistant", "content": "one two three " * 9}], plain=True)
    options = {"max_length": 20, "overlong": "split"}
    tokenizer = tokenizers["headers"]
    assert len(encode(tokenizer, text, settings=settings(**options))) > 2
    assert problems(tokenizer, text, **options) == []


def test_doubled_bos(make_tokenizer, row, problems):
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML, bos="<s>", eos="<eos>")
    assert problems(tokenizer, row("a", "b")) == [
        ("train.jsonl:1", "begins with 2 BOS tokens", True)
    ]


@pytest.mark.parametrize(("adds_bos", "count"), [(True, 1), (False, 0)])
def test_bos_missing_only_where_the_model_expects_one(
    adds_bos, count, make_tokenizer, row, problems
):
    tokenizer = make_tokenizer(CHATML, bos="<s>", eos="<|im_end|>", adds_bos=adds_bos)
    found = problems(tokenizer, row("a", "b"))
    assert len(found) == count
    assert all("has no BOS token" in problem and not fatal for _, problem, fatal in found)


def test_bos_once_where_tokenizer_and_template_both_write_it(make_tokenizer, row, problems):
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, bos="<s>", adds_bos=True)
    (sample,) = encode(tokenizer, row("a", "b"), settings=settings())
    assert sample.ids.count(tokenizer.bos_token_id) == 1
    assert problems(tokenizer, row("a", "b")) == []


def test_empty_turn(tokenizers, row, problems):
    (empty,) = encode(tokenizers["chatml"], row("a", "b"), settings=settings())
    expected = [("train.jsonl:1", "message 2 (assistant) is empty", False)]
    assert problems(tokenizers["chatml"], row("a", " ", "b", "c"), [empty]) == expected


def test_a_turn_that_calls_tools_needs_no_text(tokenizers, row, problems):
    (sample,) = encode(tokenizers["chatml"], row("a", "b"), settings=settings())
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [row("a").messages[0], call]
    assert problems(tokenizers["chatml"], Row("x", 1, messages), [sample]) == []
