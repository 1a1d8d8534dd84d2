import statistics

import pytest

from qtune.data.chat import Sample, encode
from qtune.data.lint import Finding, lint, overlap, summary
from qtune.data.rows import Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("chatml", "headers", "gemma", "inst", "end_once", "markers", "thinking")


def problems(findings):
    return [(finding.row.number, finding.problem, finding.fatal) for finding in findings]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_good_samples_have_no_findings(family, train_on, tokenizers, row):
    tokenizer = tokenizers[family]
    rows = [row("Hi", "Hello!", "2+2?", f"It is {n}.", number=n) for n in range(1, 4)]
    samples = [encode(tokenizer, r, train_on=train_on, max_length=500) for r in rows]
    assert lint(samples, tokenizer) == []


def test_nothing_learned(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    silent = Sample(row("a", "b"), [40, 41], [False, False])
    cut = encode(tokenizer, row("a b c", "d", number=2), max_length=4, truncate=True)
    assert problems(lint([silent, cut], tokenizer))[:2] == [
        (1, "no token would be learned", True),
        (2, f"no token would be learned ({cut.num_cut} tokens were cut)", True),
    ]


def test_end_of_turn_not_learned(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = encode(tokenizer, row("a", "b."), max_length=500)
    ((number, problem, fatal),) = problems(lint([sample], tokenizer))
    assert number == 1 and fatal
    assert problem.startswith("the end of the turn would not be learned (the last target is ")


def test_end_of_turn_of_a_cut_sample_is_not_missed(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    sample = encode(tokenizer, row("a", "b " * 30), max_length=20, truncate=True)
    ((_, problem, fatal),) = problems(lint([sample], tokenizer))
    assert problem == "cut at data.max_length, as 1 of 1 rows are (100%)"
    assert not fatal


def test_doubled_bos(make_tokenizer, row):
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML, bos="<s>", eos="<eos>")
    sample = encode(tokenizer, row("a", "b"), max_length=500)
    assert problems(lint([sample], tokenizer)) == [(1, "begins with 2 BOS tokens", True)]


@pytest.mark.parametrize(("adds_bos", "count"), [(True, 1), (False, 0)])
def test_bos_missing_only_where_the_model_expects_one(adds_bos, count, make_tokenizer, row):
    tokenizer = make_tokenizer(CHATML, bos="<s>", eos="<|im_end|>", adds_bos=adds_bos)
    sample = encode(tokenizer, row("a", "b"), max_length=500)
    found = lint([sample], tokenizer)
    assert len(found) == count
    assert all("has no BOS token" in f.problem and not f.fatal for f in found)


def test_bos_once_where_tokenizer_and_template_both_write_it(make_tokenizer, row):
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, bos="<s>", adds_bos=True)
    sample = encode(tokenizer, row("a", "b"), max_length=500)
    assert sample.ids.count(tokenizer.bos_token_id) == 1
    assert lint([sample], tokenizer) == []


def test_empty_turn(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    sample = encode(tokenizer, row("a", " ", "b", "c"), max_length=500)
    assert problems(lint([sample], tokenizer)) == [(1, "message 2 (assistant) is empty", False)]


def test_repeated_rows(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    rows = [row(*t, number=n) for n, t in enumerate([("a", "b"), ("a", "c"), ("a", "b")], start=1)]
    samples = [encode(tokenizer, r, max_length=500) for r in rows]
    assert problems(lint(samples, tokenizer)) == [(3, "the same as train.jsonl:1", False)]


def test_cut_rows_are_one_finding(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    texts = ["b", "b " * 30, "c", "c " * 30]
    rows = [row("a", text, number=n) for n, text in enumerate(texts, start=1)]
    samples = [encode(tokenizer, r, max_length=25, truncate=True) for r in rows]
    expected = (2, "cut at data.max_length, as 2 of 4 rows are (50%)", False)
    assert problems(lint(samples, tokenizer)) == [expected]


def test_overlap():
    def make(source, number, *texts):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
        return Sample(Row(source, number, messages), [1], [True])

    train = [make("t", 1, "a", "b"), make("t", 2, "c", "d"), make("t", 3, "a", "b")]
    held_out = [make("v", 1, "a", "b"), make("v", 2, "c", "x"), make("v", 3, "e", "d")]
    assert [str(finding) for finding in overlap(train, held_out)] == [
        "v:1: held out, but also a training row (t:1)",
        "v:2: held out, but training has its prompt (t:2)",
    ]
    assert not any(finding.fatal for finding in overlap(train, held_out))


def test_finding_as_text(row):
    assert str(Finding(row("a", "b", number=9), "odd", fatal=False)) == "train.jsonl:9: odd"


def test_summary():
    lengths = [3, 9, 4, 4, 20]
    samples = [
        Sample(Row("x", i, []), [0] * n, [False] + [True] * (n - 1), num_cut=i == 4)
        for i, n in enumerate(lengths)
    ]
    found = summary(samples)
    expected = {"rows": 5, "tokens": 40, "supervised_tokens": 35, "supervised_share": 0.875}
    expected |= {"cut_rows": 1, "length_min": 3, "length_max": 20}
    assert {key: found[key] for key in expected} == expected
    assert found["length_p50"] == statistics.median(lengths)
    assert 9 < found["length_p90"] < found["length_p99"] < 20


def test_summary_of_one_sample():
    found = summary([Sample(Row("x", 1, []), [0] * 6, [False] * 6)])
    for key in ("length_min", "length_p50", "length_p90", "length_p99", "length_max"):
        assert found[key] == 6
