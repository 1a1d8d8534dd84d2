"""Answers against the expected one, by ids and by text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qtune.model.load import load_tokenizer
from qtune.serving.answers import BEYOND, Expected, compare
from qtune.serving.client import Answer

STOP = 2


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


@pytest.fixture
def expected(tokenizer: PreTrainedTokenizerBase) -> Expected:
    """The answer `abc`, after which the model stops."""
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abc"]
    other = tokenizer.convert_tokens_to_ids("z")
    entry: dict[str, Any] = {
        "greedy_ids": [*ids, STOP],
        "greedy_logprobs": [-0.5, -0.5, -0.5, -0.5],
        "top_ids": [[token, other] for token in [*ids, STOP]],
        "top_logprobs": [[-0.5, -2.0], [-0.5, -0.6], [-0.5, -2.0], [-0.5, -2.0]],
    }
    return Expected(entry, tokenizer, [STOP])


def answer(expected: Expected, text: str, *, ids: bool, **fields: Any) -> Answer:
    """An answer that ends by itself, with the log-probabilities that are expected."""
    tokens = [int(expected.tokenizer.convert_tokens_to_ids(letter)) for letter in text]
    made = Answer(text, tokens if ids else None, [-0.5] * len(tokens), True, None)
    return replace(made, **fields)


def test_expected_answer_is_without_its_stop_token(expected: Expected) -> None:
    assert expected.ended and expected.beginnings == ["a", "ab", "abc"]
    assert expected.max_tokens == 4 + BEYOND
    open_end = replace(expected, stops=[0])
    assert not open_end.ended and open_end.max_tokens == 4 and len(open_end.ids) == 4


@pytest.mark.parametrize("ids", [True, False])
def test_same_answer(ids: bool, expected: Expected) -> None:
    found = compare(expected, answer(expected, "abc", ids=ids))
    assert (found.what, found.change, found.tie) == ("", 0.0, False)


@pytest.mark.parametrize("ids", [True, False])
def test_other_token_is_named(ids: bool, expected: Expected) -> None:
    found = compare(expected, answer(expected, "abz", ids=ids))
    now = f"{expected.tokenizer.convert_tokens_to_ids('z')} ('z')" if ids else "'z'"
    was = f"{expected.ids[2]} ('c')"
    assert found.what == f"token 3 of the answer is {now}, and should be {was}"
    assert not found.tie


@pytest.mark.parametrize("ids", [True, False])
def test_token_about_as_likely_is_a_tie(ids: bool, expected: Expected) -> None:
    found = compare(expected, answer(expected, "azzzz", ids=ids))
    assert (found.what, found.tie) == ("", True)


@pytest.mark.parametrize("ids", [True, False])
def test_answer_that_stops_too_early(ids: bool, expected: Expected) -> None:
    found = compare(expected, answer(expected, "ab", ids=ids))
    assert found.what.startswith("token 3 of the answer is the end of the answer, and should be ")
    assert compare(expected, answer(expected, "", ids=ids)).what.startswith("token 1 of the answer")


@pytest.mark.parametrize("ids", [True, False])
def test_answer_that_does_not_stop(ids: bool, expected: Expected) -> None:
    found = compare(expected, answer(expected, "abcabc", ids=ids, stopped=False))
    assert found.what == "it does not stop at token 4, 2 ('<|im_end|>')"
    open_end = replace(expected, stops=[])
    made = Answer("abc", open_end.ids if ids else None, None, False, None)
    assert compare(open_end, made).what == ""


def test_space_at_the_beginning_is_no_difference(expected: Expected) -> None:
    assert compare(expected, Answer(" abc", None, None, True, None)).what == ""


def test_ids_that_are_not_all_of_the_text_are_not_used(expected: Expected) -> None:
    """As those of llama.cpp, which tells none for pieces of characters."""
    made = answer(expected, "abc", ids=True, log_probabilities=[-0.5, -0.6])
    found = compare(expected, replace(made, ids=expected.ids[:2]))
    assert found.what == "" and found.change == pytest.approx(0.05)
    found = compare(expected, replace(made, ids=[expected.ids[0], expected.ids[2]]))
    assert found.what == "" and found.change == 0


def test_halves_of_characters_may_be_more_or_fewer(expected: Expected) -> None:
    pieces = expected.tokenizer("\u20ac", add_special_tokens=False).input_ids[:2]
    half = replace(expected, entry=expected.entry | {"greedy_ids": [*pieces, STOP]})
    assert half.ids == pieces
    for text in ("\ufffd", "\ufffd\ufffd"):
        assert compare(half, Answer(text, None, None, True, None)).what == ""


def test_change_is_taken_up_to_the_first_other_token(expected: Expected) -> None:
    found = answer(expected, "abz", ids=True, log_probabilities=[-0.6, -0.8, -9.0])
    assert compare(expected, found).change == pytest.approx(0.2)
    assert compare(expected, replace(found, log_probabilities=None)).change is None
    first = answer(expected, "z", ids=True)
    assert compare(expected, first).change is None
