"""The demo in other forms."""

import json

import pytest

from qtune.data import demo
from qtune.data.demo_forms import in_form, mistaken


def test_the_first_form_is_the_demo_itself() -> None:
    rows = demo.rows("train", 5)
    assert in_form(rows, "messages") == rows


def test_pairs_share_a_prompt_and_differ_in_one_field() -> None:
    rows = demo.rows("train", 20)
    for pair, row in zip(in_form(rows, "preference"), rows, strict=True):
        assert pair["prompt"] + pair["chosen"] == row["messages"]
        better, worse = (json.loads(pair[key][0]["content"]) for key in ("chosen", "rejected"))
        assert [
            key for key in better if better[key] != worse[key]
        ] and better.keys() == worse.keys()
        assert sum(better[key] != worse[key] for key in better) == 1


def test_half_of_the_judged_answers_are_right() -> None:
    rows = demo.rows("train", 20)
    found = in_form(rows, "label")
    right = [
        row["completion"][0]["content"] == r["messages"][-1]["content"]
        for row, r in zip(found, rows, strict=True)
    ]
    assert right == [row["label"] for row in found] and sum(right) == 10


def test_text_holds_request_and_answer() -> None:
    (row,) = demo.rows("train", 1)
    (text,) = in_form([row], "text")
    assert text["text"] == row["messages"][1]["content"] + "\n" + row["messages"][2]["content"]


@pytest.mark.parametrize("number", range(4))
def test_every_mistake_changes_every_answer(number: int) -> None:
    for row in demo.rows("test", 50):
        answer = row["messages"][-1]["content"]
        assert json.loads(mistaken(answer, number)) != json.loads(answer)
