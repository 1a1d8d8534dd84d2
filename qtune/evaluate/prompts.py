"""A file of prompts that every model of a run answers, so that their answers stand side by side.

Prompts are no test rows: they need no expected answer and are not scored; they are for the reader.
`.txt` has one in each line; `.jsonl`, `.json` and `.yaml` have texts, or objects with `prompt` or
`messages` and, where it is known, `reference`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtune.data.files import missing
from qtune.data.messages import checked_messages
from qtune.data.readers import json_lines, json_list
from qtune.data.records import Broken, Records, opened_text
from qtune.data.rows import Problems, Row
from qtune.data.values import BadRow, is_blank, kind
from qtune.errors import UserError

KEYS = ("prompt", "messages", "reference")


class Suite:
    """Prompts, and what the models measured so far answered to them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.answers: dict[str, list[str]] = {}
        self._gone: set[str] = set()

    def rename(self, old: str, new: str) -> None:
        """Tell the answers of a model whose row has another name now by that."""
        self.answers[new] = self.answers.pop(old)
        self._gone.add(old)

    def beside(self, earlier: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
        """What prompts.json holds: these answers, and those of other models to the same prompts."""
        known = {entry["prompt"]: entry["answers"] for entry in earlier or ()}
        entries = []
        for i, row in enumerate(self.rows):
            answers = known.get(asked(row), {}) | {n: texts[i] for n, texts in self.answers.items()}
            entries.append(
                {
                    "prompt": asked(row),
                    "reference": row.messages[-1]["content"] or None,
                    "answers": {n: text for n, text in answers.items() if n not in self._gone},
                }
            )
        return entries


def asked(row: Row) -> str:
    """The conversation of a prompt as one text; of a single message its content."""
    messages = row.messages[:-1]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages)


def read_prompts(path: Path) -> list[Row]:
    """The prompts of a file, each with its reference, or with "", as the last message.

    Raises UserError with all mistakes, each with its place.
    """
    problems, rows = Problems(), []
    for number, record in _records(path):
        try:
            rows.append(Row(str(path), number, _messages(record)))
        except BadRow as bad:
            for fault in bad.faults:
                problems.add(f"{path}:{number}", fault)
    problems.raise_if_any()
    if not rows:
        raise UserError(f"{path}: holds no prompt; write one in each line")
    return rows


def _records(path: Path) -> Records:
    if not path.is_file():
        raise UserError(missing(path))
    readers = {
        ".txt": _lines,
        ".jsonl": json_lines.read,
        ".json": json_list.read,
        ".yaml": _yaml_items,
        ".yml": _yaml_items,
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of prompt file; use {', '.join(readers)}")
    return readers[path.suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with opened_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _yaml_items(path: Path) -> Iterator[tuple[int, Any]]:
    with opened_text(path) as file:
        try:
            items = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(items, list):
        raise UserError(f"{path}: must be a list of prompts, not {kind(items)}")
    yield from enumerate(items, start=1)


def _messages(record: Any) -> list[dict[str, Any]]:
    """The conversation of a record and its reference. Raises BadRow."""
    if isinstance(record, Broken):
        raise BadRow(record.problem)
    entry = {"prompt": record} if isinstance(record, str) else record
    if not isinstance(entry, dict):
        raise BadRow(f"must be text or an object, not {kind(record)}")
    unknown = sorted(entry.keys() - set(KEYS))
    if unknown:
        raise BadRow(f"has the unknown key '{unknown[0]}'; known are {', '.join(KEYS)}")
    reference = entry.get("reference") or ""
    if not isinstance(reference, str):
        raise BadRow(f"'reference' must be text, not {kind(reference)}")
    return [*_conversation(entry), {"role": "assistant", "content": reference}]


def _conversation(entry: dict[str, Any]) -> list[dict[str, Any]]:
    if ("prompt" in entry) == ("messages" in entry):
        raise BadRow("needs either 'prompt' or 'messages', and not both")
    if "messages" in entry:
        return checked_messages(entry["messages"])
    if not isinstance(entry["prompt"], str) or is_blank(entry["prompt"]):
        raise BadRow("'prompt' must be text that is not blank")
    return [{"role": "user", "content": entry["prompt"]}]
