"""How much of a JSON object is right, field by field.

A field is what stands at one path of keys: `address.city` in {"address": {"city": ...}}; a list is
one value. An answer's share is its right fields over all fields that it or its reference has, so
that a field too many counts like a wrong one, and an answer with all fields right has 1. What is no
JSON object has no fields.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from qtune.evaluate.strict_json import parsed, same

Fields = dict[str, Any]


def share_of_fields(answer: str, reference: str) -> float:
    """The share of right fields; 0 where one of both is no JSON object."""
    found, expected = fields(answer), fields(reference)
    if found is None or expected is None:
        return 0.0
    names = found.keys() | expected.keys()
    return sum(_right(name, found, expected) for name in names) / len(names) if names else 1.0


def field_shares(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """For each field of the references, the share of answers that have it right; common first."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, reference in zip(answers, references, strict=True):
        found, expected = fields(answer) or {}, fields(reference) or {}
        for name in expected:
            right[name].append(_right(name, found, expected))
    names = sorted(right, key=lambda name: -len(right[name]))
    return {name: sum(right[name]) / len(right[name]) for name in names}


def fields(text: str) -> Fields | None:
    """The values of a JSON object by their paths; None where the text is none."""
    try:
        value = parsed(text)
    except (ValueError, RecursionError):
        return None
    return dict(_flat(value)) if isinstance(value, dict) else None


def _flat(value: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        # an empty object would else leave no trace
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{start}{key}.")
        else:
            yield f"{start}{key}", inner


def _right(name: str, found: Fields, expected: Fields) -> bool:
    return name in found and name in expected and same(found[name], expected[name])
