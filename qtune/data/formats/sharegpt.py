"""Conversations in ShareGPT's words: `{"conversations": [{"from": "human", "value": ...}, ...]}`.

A `function_call` is an assistant's message whose value is the call in JSON (or a list of calls), an
`observation` the tool's answer. System prompt and tools may be columns of their own.
"""

from typing import Any

from qtune.data.format import Format, Parts, Record
from qtune.data.messages import checked_messages, ending_with_answer, with_system
from qtune.data.rows import Message
from qtune.data.tools import checked_tools
from qtune.data.values import BadRow, each, kind, parsed

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _parts(record: Record) -> Parts:
    turns = parsed(record["conversations"], "conversations")
    if not isinstance(turns, list):
        raise BadRow(f"'conversations' must be a list of messages, not {kind(turns)}")
    if not turns:
        raise BadRow("'conversations' must be a list of messages; this one is empty")
    messages = checked_messages(each(turns, _message, "message"))
    messages = with_system(ending_with_answer(messages, "conversations"), record.get("system"))
    return Parts(messages, tools=checked_tools(record.get("tools")))


def _message(turn: Any) -> Message:
    """The turn in the words of `messages`, which are checked there."""
    if not isinstance(turn, dict):
        raise BadRow(f"must be an object with 'from' and 'value', not {kind(turn)}")
    if turn.get("from") is None and "role" in turn:
        raise BadRow("has a 'role'; take format: messages, columns: {messages: conversations}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise BadRow(f"has 'from' with {speaker!r}; allowed are {', '.join(_ROLES)}")
    said = {key: value for key, value in turn.items() if key not in ("from", "value")}
    said["role"] = _ROLES[speaker]
    if speaker != "function_call":
        return {**said, "content": turn.get("value")}
    calls = parsed(turn.get("value"), "value")
    return {**said, "tool_calls": calls if isinstance(calls, list) else [calls]}


FORMAT = Format((frozenset({"conversations"}),), frozenset({"system", "tools"}), _parts)
