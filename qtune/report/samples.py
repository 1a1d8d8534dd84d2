"""Answers laid out for comparison: JSON objects field by field with what differs marked, else text.

The marks only show where to look. Whether an answer counts as correct was decided by the
evaluation, and is read from samples.json.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# longer texts are cut on the page; samples.json has them whole
MAX_CHARACTERS = 1500

State = Literal["same", "different", "missing", "extra"]


@dataclass(frozen=True)
class Field:
    """One field of a JSON answer and how it compares with the reference."""

    name: str
    value: str
    state: State


@dataclass(frozen=True)
class Answer:
    """One answer: its fields where it is a JSON object like its reference, its text where not."""

    title: str
    correct: bool | None
    fields: list[Field]
    text: str


@dataclass(frozen=True)
class Shown:
    """A sample as the page shows it."""

    prompt: str
    answers: list[Answer]


def laid_out(sample: dict[str, Any]) -> Shown:
    """A sample of samples.json, its answers compared with its reference."""
    reference = sample["reference"]
    answers = [
        _answer("Before", sample["before"], reference, sample["correct_before"]),
        _answer("After", sample["after"], reference, sample["correct_after"]),
        _answer("Reference", reference, reference, None),
    ]
    return Shown(clipped(sample["prompt"]), answers)


def clipped(text: str) -> str:
    """The text, or its start and a word on its length where it is too long for the page."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … [cut here; {len(text):,} characters in samples.json]"


def compared(answer: dict[str, Any], reference: dict[str, Any]) -> Iterator[Field]:
    """The fields of an answer, then those it lacks."""
    for name, value in answer.items():
        state: State = "extra"
        if name in reference:
            state = "same" if _spelled(value) == _spelled(reference[name]) else "different"
        yield Field(name, clipped(json.dumps(value, ensure_ascii=False)), state)
    for name in reference:
        if name not in answer:
            yield Field(name, "", "missing")


def _answer(title: str, text: str, reference: str, correct: bool | None) -> Answer:
    found, expected = _object(text), _object(reference)
    fields = [] if found is None or expected is None else list(compared(found, expected))
    return Answer(title, correct, fields, clipped(text))


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        # an untrained model may open brackets without end
        return None
    return value if isinstance(value, dict) else None


def _spelled(value: Any) -> str:
    """JSON of a value in one spelling; a whole number is the same with and without its point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)
