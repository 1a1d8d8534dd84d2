"""Questions with one answer each: instruction, input, output, maybe a system prompt and a history.

They become messages for the model's own template. An input follows its instruction behind an empty
line; the history is a list of [question, answer] that came before.
"""

from typing import Any

from qtune.data.format import Format, Parts, Record
from qtune.data.rows import Message
from qtune.data.values import BadRow, each, is_blank, kind, parsed, text


def _parts(record: Record) -> Parts:
    answer = {"role": "assistant", "content": text(record["output"], "output")}
    return Parts([*question(record), answer])


def question(record: Record) -> list[Message]:
    """The messages before the answer. Raises BadRow."""
    turns = [(role, text(record[role], role)) for role in _system(record)]
    for asked, answered in _history(record.get("history")):
        turns += [("user", asked), ("assistant", answered)]
    turns.append(("user", _instruction(record)))
    return [{"role": role, "content": content} for role, content in turns]


def _system(record: Record) -> list[str]:
    return [] if is_blank(record.get("system")) else ["system"]


def _instruction(record: Record) -> str:
    instruction = text(record["instruction"], "instruction")
    if is_blank(record.get("input")):
        return instruction
    return f"{instruction}\n\n{text(record['input'], 'input')}"


def _history(value: Any) -> list[tuple[str, str]]:
    if is_blank(value):
        return []
    turns = parsed(value, "history")
    if not isinstance(turns, list):
        raise BadRow(f"'history' must be a list of [question, answer], not {kind(turns)}")
    return each(turns, _turn, "'history': turn")


def _turn(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise BadRow("must be [question, answer]")
    return text(value[0], "question"), text(value[1], "answer")


FORMAT = Format(
    (frozenset({"instruction", "output"}),), frozenset({"input", "system", "history"}), _parts
)
