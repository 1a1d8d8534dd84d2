"""Differences are named by their keys."""

from qtune.serving.difference import Difference, length_in_common, values


def told(was: object, now: object) -> list[str]:
    return [str(difference) for difference in values("f.json", was, now)]


def test_values_that_differ_are_named_by_their_keys() -> None:
    was = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "gone": None}
    now = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "new": {"e": 1}}
    assert told(was, now) == [
        "f.json: b.c is [1, 3], and was [1, 2]",
        "f.json: gone is missing, and was None",
        "f.json: new is {'e': 1}, and was not there",
    ]
    assert told(was, was) == []


def test_true_is_not_one() -> None:
    assert told({"a": 1}, {"a": True}) == ["f.json: a is True, and was 1"]
    assert told({"a": 1}, {"a": 1.0}) == []


def test_long_values_are_cut() -> None:
    (line,) = told({"a": "x" * 100}, {"a": 1})
    assert line.endswith("x...") and len(line) < 100


def test_difference_does_not_break_a_folder_by_itself() -> None:
    assert not Difference("a", "b").breaks


def test_length_in_common() -> None:
    assert [length_in_common("abc", other) for other in ("abd", "ab", "abcd", "x", "")] == [
        2, 2, 3, 0, 0,
    ]  # fmt: skip
