import pytest

from qtune.data.rows import Problems, Row
from qtune.errors import UserError


def told(problems):
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    return str(caught.value).splitlines()


def test_place():
    assert Row("x.jsonl", 3, []).place == "x.jsonl:3"


def test_ten_problems_are_enough():
    problems = Problems()
    for i in range(9):
        problems.add(f"f:{i}", f"bad {i}")
    with pytest.raises(UserError) as caught:
        problems.add("f:9", "bad 9")
    *lines, last = str(caught.value).splitlines()
    assert lines == [f"f:{i}: bad {i}" for i in range(10)]
    assert last == "stopped after 10 problems; there may be more"


def test_the_same_mistake_is_told_once():
    problems = Problems()
    for place, text in (("f:1", "a"), ("f:2", "b"), ("f:5", "a"), ("f:9", "a")):
        problems.add(place, text)
    assert told(problems) == ["f:1: a (and 2 more, up to f:9)", "f:2: b"]


def test_no_problem_no_error():
    Problems().raise_if_any()
