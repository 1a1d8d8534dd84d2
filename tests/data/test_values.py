import datetime

import pytest

from qtune.data.values import BadRow, each, has_half_pair, is_blank, kind, parsed, text


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "nothing"),
        (True, "true or false"),
        (2.5, "a number"),
        ("", "text"),
        ([], "a list"),
        ({}, "an object"),
        (datetime.date(2026, 1, 1), "date"),
    ],
)
def test_kind(value, word):
    assert kind(value) == word


def test_blank_cells():
    assert [is_blank(value) for value in (None, "", " \n", "a", 0, [], False)] == [
        *(True, True, True, False, False, False, False)
    ]


def test_text_is_kept_as_it_is():
    assert text(" a\n", "x") == " a\n"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "'x' must be text, not a number"),
        (" ", "'x' is empty; fill it, or leave the row out by where: {x: '!='}"),
        ("a\ud800", "'x' has half a surrogate pair, which no tokenizer can read"),
    ],
)
def test_bad_texts(value, problem):
    with pytest.raises(BadRow) as caught:
        text(value, "x")
    assert caught.value.faults == [problem]


def test_half_pairs():
    # A whole pair is one character to Python, and json.loads puts the halves together.
    assert not has_half_pair("\U0001f600")
    assert has_half_pair("\udc00")


def test_parsed():
    assert parsed('{"a": [1]}', "x") == {"a": [1]}
    value = [1]
    assert parsed(value, "x") is value
    with pytest.raises(BadRow, match=r"^'x' is text, but not valid JSON \(Expecting value"):
        parsed("hi", "x")


def test_each_collects_the_faults_of_all():
    with pytest.raises(BadRow) as caught:
        each(["a", 1, ""], lambda value: text(value, "x"), "item")
    assert [fault[:6] for fault in caught.value.faults] == ["item 2", "item 3"]
    assert each([1, 2], str, "item") == ["1", "2"]
