"""Which messages count how much; the tokens themselves are compared in test_chat.py."""

from dataclasses import replace

import pytest

from qtune.data.learned import all_spans, answer_spans, learns_all, message_weights
from qtune.data.rows import Row
from qtune.errors import UserError
from qtune.recipe import Data


def row(*texts, **weights):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    for name, weight in weights.items():
        messages[int(name[1:])]["weight"] = weight
    return Row("train.jsonl", 2, messages)


def weights_of(example, train_on="assistant"):
    return message_weights(example, example.messages, Data(train="x", train_on=train_on))


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("assistant", [0, 1, 0, 1]), ("last", [0, 0, 0, 1]), ("all", [1, 1, 1, 1])],
)
def test_train_on(train_on, expected):
    assert weights_of(row("a", "b", "c", "d"), train_on) == expected


def test_own_weights_multiply():
    example = row("a", "b", "c", "d", _1=0.5, _3=2)
    assert weights_of(example) == [0, 0.5, 0, 2]
    assert weights_of(example, "last") == [0, 0, 0, 2]


def test_weight_of_a_question():
    with pytest.raises(UserError, match=r"train\.jsonl:2: message 3 \(user\) has a weight"):
        weights_of(row("a", "b", "c", "d", _2=1))
    assert weights_of(row("a", "b", _0=0)) == [0, 1]
    assert weights_of(row("a", "b", _0=0.5), "all") == [0.5, 1]


def test_pairs_and_labels_learn_answers_only():
    pair = replace(row("a", "b", "c", "d"), rejected=row("a", "b", "c", "e").messages)
    assert weights_of(pair, "all") == weights_of(pair) == [0, 0, 0, 1]
    assert weights_of(replace(row("a", "b", "c", "d"), label=True), "all") == [0, 0, 0, 1]
    settings = Data(train="x", train_on="all")
    assert learns_all(row("a", "b"), settings)
    assert not learns_all(pair, settings)


@pytest.mark.parametrize(
    ("rejected", "problem"),
    [(("a", "b"), "are the same"), (("a", "b", "c"), "no answer of their own")],
)
def test_pairs_without_a_difference(rejected, problem):
    pair = replace(row("a", "b"), rejected=row(*rejected).messages)
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{problem}"):
        weights_of(pair)


def test_no_answer():
    with pytest.raises(UserError, match=r"train\.jsonl:2: no message is the assistant's"):
        weights_of(row("a"))


def test_spans():
    assert answer_spans({3: [(8, 9)], 1: [(2, 3), (4, 5)]}, [0, 0.5, 0, 1]) == [
        (2, 3, 0.5),
        (4, 5, 0.5),
        (8, 9, 1),
    ]
    assert answer_spans({1: [(2, 3)]}, [0, 0]) == []
    found = all_spans(9, [1, 0.5, 1], {1: (3, 5)}.__getitem__)
    assert found == [(0, 3, 1.0), (3, 5, 0.5), (5, 9, 1.0)]
    assert all_spans(9, [1, 1], {}.__getitem__) == [(0, 9, 1.0)]
