import pytest

from qtune.evaluate.exact_match import grade, matches, score
from qtune.evaluate.intervals import wilson_interval

REFERENCE = '{"amount": 12.5, "people": ["Ann", "Bo"], "paid": true, "project": null, "n": 1}'

SAME = [
    '{"n":1,"project":null,"paid":true,"people":["Ann","Bo"],"amount":12.5}',
    '\n {"amount": 1.25e1, "people": ["\\u0041nn", "Bo"], "paid": true,\n "project": null, "n": 1}',
]
DIFFERENT = [
    "",
    "null",
    "[" + REFERENCE + "]",
    REFERENCE + " Done.",
    "```json\n" + REFERENCE + "\n```",
    REFERENCE.replace('"n": 1', '"n": "1"'),
    REFERENCE.replace('"n": 1', '"n": 1.0'),
    REFERENCE.replace('"n": 1', '"n": true'),
    REFERENCE.replace("true", "1"),
    REFERENCE.replace("true", '"true"'),
    REFERENCE.replace("true", "True"),
    REFERENCE.replace("null", '""'),
    REFERENCE.replace("null", "false"),
    REFERENCE.replace('"Ann", "Bo"', '"Bo", "Ann"'),
    REFERENCE.replace('"Ann", "Bo"', '"Ann"'),
    REFERENCE.replace(', "n": 1', ""),
    REFERENCE.replace('"n": 1', '"n": 1, "m": 2'),
    # readers differ on which of the two counts
    REFERENCE.replace('"n": 1', '"n": 1, "n": 1'),
    REFERENCE.replace('"n": 1', '"n": 2, "n": 1'),
    REFERENCE.replace("12.5", "NaN"),
    REFERENCE.replace('"', "'"),
    REFERENCE.replace('"n": 1', '"n": 1,'),
    "[" * 100_000,
    "1" * 10_000,
]


@pytest.mark.parametrize("answer", [REFERENCE, *SAME])
def test_same_json(answer: str) -> None:
    assert matches(answer, REFERENCE, "json_match")


@pytest.mark.parametrize("answer", DIFFERENT, ids=lambda answer: answer[-24:])
def test_different_json(answer: str) -> None:
    assert not matches(answer, REFERENCE, "json_match")


def test_duplicate_keys_inside_count_too() -> None:
    assert not matches('{"a": [{"b": 1, "b": 1}]}', '{"a": [{"b": 1}]}', "json_match")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Yes.", True), (" Yes.\n", True), ("yes.", False), ("Yes. No.", False), ("", False)],
)
def test_text(answer: str, right: bool) -> None:
    assert matches(answer, "Yes.", "exact_match") is right


def test_text_metric_does_not_read_json() -> None:
    assert not matches('{"a":1}', '{"a": 1}', "exact_match")


def test_score() -> None:
    made = score(["a", "b", "c", "d"], ["a", "B", "c", "d"], "exact_match")
    assert made.values == [1, 0, 1, 1]
    assert made.value == 0.75
    assert made.interval == wilson_interval(3, 4)


def test_score_needs_answers_and_pairs() -> None:
    with pytest.raises(ValueError, match="no answers"):
        score([], [], "exact_match")
    with pytest.raises(ValueError):
        score(["a"], ["a", "b"], "exact_match")


@pytest.mark.parametrize(
    ("answer", "right"), [("It is Paris.", 1), ("Paris", 1), ("paris", 0), ("Pari s", 0), ("", 0)]
)
def test_contained_text(answer: str, right: float) -> None:
    assert grade(answer, " Paris\n", "contains") == right


def test_nothing_is_contained_in_everything() -> None:
    assert not matches("anything", " ", "contains")


def test_each_metric_is_asked() -> None:
    assert grade("so 3 + 4 = 7", "#### 7", "number_match") == 1
    assert grade('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', "json_fields") == 0.5
    assert not matches('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', "json_fields")
    assert matches('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', "json_fields")
