"""Which column of a source is which of a format: the recipe's mapping, and guesses for messages.

A record whose columns fit no format is never guessed at in silence; what it probably is, is told
with the lines to write.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from qtune.data.format import FORMAT_NAMES, Record, load_format
from qtune.data.values import kind

# What data sets call a column that a format calls otherwise, most telling first.
_OTHER_NAMES = {
    "instruction": ("question", "query", "problem", "prompt", "input", "user", "inputs"),
    "output": ("answer", "response", "completion", "solution", "assistant", "target", "targets"),
    "text": ("content", "body", "document", "article", "passage"),
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("answer", "response", "output", "target"),
    "chosen": ("preferred", "accepted"),
    "rejected": ("dispreferred", "refused"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat"),
    "conversations": ("conversation", "messages", "dialog", "dialogue", "chat"),
    "label": ("is_good", "desirable", "score"),
}
QUESTIONS = _OTHER_NAMES["instruction"]


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """The record under the names of its format, given the source's column of each such name."""
    if not columns:
        return record
    taken = set(columns.values())
    kept = {name: value for name, value in record.items() if name not in taken}
    return kept | {name: record[column] for name, column in columns.items() if column in record}


def named(names: Iterable[str]) -> str:
    """The names of columns, quoted, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "no columns"


def missing(record: Record, name: str, columns: Mapping[str, str]) -> str:
    """What to write where a record, renamed, lacks columns of the format called `name`."""
    nearest = min(load_format(name).needs, key=lambda need: len(need - record.keys()) / len(need))
    needs = sorted(nearest - record.keys())
    lacking = named(columns.get(need, need) for need in needs)
    found = f"no column {lacking} in this row, which has {named(record)}"
    guesses = {need: _guess(need, record) for need in needs}
    if all(guesses.values()):
        return f"{found}; write {_mapping(guesses)}"
    return f"{found}; format: {name} needs {_needs(name)}"


def unknown(record: Record, columns: Mapping[str, str]) -> str:
    """What to write where the columns of a record, renamed, fit no format."""
    absent = {name: column for name, column in columns.items() if name not in record}
    if absent:
        close = {name: _close(column, record) for name, column in absent.items()}
        found = f"no column {named(absent.values())} in this row, which has {named(record)}"
        return found + (f"; write {_mapping(close)}" if all(close.values()) else "")
    found = f"this row has {named(record)}, which fits no format"
    suggestion = _suggestion(record)
    if suggestion:
        return f"{found}; write {suggestion}"
    formats = "; ".join(f"{name}: {_needs(name)}" for name in FORMAT_NAMES)
    return f"{found}; map the columns with columns: {{text: COLUMN}}. Formats need: {formats}"


def _suggestion(record: Record) -> str | None:
    for column, value in record.items():
        keys = value[0].keys() if _holds_objects(value) else set()
        for key, name, own in (
            ("role", "messages", "messages"),
            ("from", "sharegpt", "conversations"),
        ):
            if key in keys:
                return f"format: {name}, {_mapping({own: column})}"
    for name in ("alpaca", "text"):
        guesses = {need: _guess(need, record) for need in sorted(load_format(name).needs[0])}
        if all(guesses.values()):
            return f"format: {name}, {_mapping(guesses)}"
    return None


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _guess(name: str, record: Record) -> str | None:
    """The column that is probably what a format calls `name`."""
    lower = {column.lower(): column for column in record}
    for other in (name, *_OTHER_NAMES.get(name, ())):
        if other in lower:
            return lower[other]
    return _close(name, record)


def _close(name: str, record: Record) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(record), n=1)), None)


def _mapping(columns: Mapping[str, str | None]) -> str:
    pairs = (f"{name}: {column}" for name, column in columns.items() if name != column)
    return f"columns: {{{', '.join(pairs)}}}"


def _needs(name: str) -> str:
    return " or ".join(" + ".join(sorted(need)) for need in load_format(name).needs)


def no_object(value: Any) -> str:
    """What to write where a record is no object at all."""
    return f'a row must be an object such as {{"messages": [...]}}, not {kind(value)}'
