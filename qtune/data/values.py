"""Checks of single values of a record, shared by all formats.

A value is returned in the form that rows have, or its faults are raised as `BadRow`: in words that
follow the place of the row, which only the reader of the source knows.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


class BadRow(Exception):
    """What is wrong with a record, one text per fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def kind(value: Any) -> str:
    """A JSON word for the type of a value."""
    return "nothing" if value is None else _KINDS.get(type(value), type(value).__name__)


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing: null, or text without a letter, as empty cells of a CSV are."""
    return value is None or (isinstance(value, str) and not value.strip())


def text(value: Any, name: str) -> str:
    """A text that says something. Raises BadRow for anything else."""
    if not isinstance(value, str):
        raise BadRow(f"'{name}' must be text, not {kind(value)}")
    if not value.strip():
        raise BadRow(f"'{name}' is empty; fill it, or leave the row out by where: {{{name}: '!='}}")
    if has_half_pair(value):
        raise BadRow(f"'{name}' has half a surrogate pair, which no tokenizer can read")
    return value


def parsed(value: Any, name: str) -> Any:
    """The value, or what it says in JSON where it is a text: so tables keep lists in a cell.

    Raises BadRow where the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"'{name}' is text, but not valid JSON ({error})") from error


def has_half_pair(value: str) -> bool:
    r"""Whether a text has half a surrogate pair, which JSON can write as "\ud83d"."""
    return _HALF_PAIR.search(value) is not None


def each(values: Iterable[Any], check: Callable[[Any], T], name: str) -> list[T]:
    """Every value as `check` returns it. Raises BadRow with the faults of all of them, numbered."""
    checked, faults = [], []
    for number, value in enumerate(values, start=1):
        try:
            checked.append(check(value))
        except BadRow as bad:
            faults += [f"{name} {number} {fault}" for fault in bad.faults]
    if faults:
        raise BadRow(*faults)
    return checked
