"""Conversations as lists of messages, checked word by word before any template sees them.

A chat template takes what it knows of a message and passes over the rest, so a misspelt key or role
would be lost without a word. What a template makes of correct messages is asked later (`chat.py`,
`lint.py`).
"""

import difflib
import math
from typing import Any

from qtune.data.rows import Message
from qtune.data.tools import checked_calls
from qtune.data.values import BadRow, each, has_half_pair, is_blank, kind, parsed, text

ROLES = ("system", "user", "assistant", "tool")

# Words other tools use for the same roles, for a better hint than "unknown".
_OTHER_WORDS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_SHAPE = '[{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
_SPECIAL = ("weight", "tool_calls")


def checked_messages(value: Any, name: str = "messages") -> list[Message]:
    """The messages in a record's value, or in the JSON that it holds as text.

    Raises BadRow with the faults of all messages.
    """
    messages = parsed(value, name)
    if not isinstance(messages, list):
        raise BadRow(f"'{name}' must be a list, not {kind(messages)}; write {_SHAPE}")
    if not messages:
        raise BadRow(f"'{name}' is empty; write {_SHAPE}")
    label = "message" if name == "messages" else f"'{name}': message"
    checked = each(messages, _message, label)
    faults = _order_faults(checked, label)
    if faults:
        raise BadRow(*faults)
    return checked


def conversation(value: Any, name: str = "messages") -> list[Message]:
    """Messages that end with the assistant's. Raises BadRow."""
    return ending_with_answer(checked_messages(value, name), name)


def ending_with_answer(messages: list[Message], name: str = "messages") -> list[Message]:
    """The same messages. Raises BadRow unless the last one is the assistant's."""
    role = messages[-1]["role"]
    if role != "assistant":
        raise BadRow(
            f"the last message of '{name}' is from the {role}; only an assistant's can be learned, "
            "so add its answer or remove the message"
        )
    return messages


def with_system(messages: list[Message], system: Any, *, plain: bool = False) -> list[Message]:
    """The messages behind the system prompt in a column of its own, which may be blank.

    Raises BadRow where they have another one, or where `plain` texts leave no place for it.
    """
    if is_blank(system):
        return messages
    first = {"role": "system", "content": text(system, "system")}
    if plain:
        raise BadRow(
            "has a system prompt, but plain texts; for a chat, map the question to `instruction` "
            "by columns: {instruction: prompt}, and a completion to `output`"
        )
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"] != first["content"]:
        raise BadRow("has a system message and another one in the column 'system'; keep only one")
    return messages


def _message(value: Any) -> Message:
    """One message without its empty keys; faults follow "message 3"."""
    if not isinstance(value, dict):
        raise BadRow(f"must be an object with 'role' and 'content', not {kind(value)}")
    # Tables name every key in every message; the absent ones are null.
    message = {key: part for key, part in value.items() if part is not None}
    # An empty list of calls, as tables have it beside the calls of other messages.
    if message.get("tool_calls") in ([], "", "[]"):
        del message["tool_calls"]
    if "from" in message and "role" not in message:
        raise BadRow("has no 'role'; take format: sharegpt, columns: {conversations: messages}")
    faults = _role_faults(message.get("role")) + _other_faults(message)
    try:
        message = _with_content(message)
        if "tool_calls" in message:
            message["tool_calls"] = checked_calls(message["tool_calls"])
    except BadRow as bad:
        faults += bad.faults
    if faults:
        raise BadRow(*faults)
    return message


def _role_faults(role: Any) -> list[str]:
    if role in ROLES:
        return []
    allowed = f"allowed are {', '.join(ROLES)}"
    if role is None:
        return [f"has no 'role'; {allowed}"]
    meant = _OTHER_WORDS.get(role) if isinstance(role, str) else None
    return [f"has the unknown role {role!r}; {allowed}" + (f" (here: '{meant}')" if meant else "")]


def _with_content(message: Message) -> Message:
    """The message with its content as one text, or without an empty one beside tool calls."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(each(content, _text_part, "has 'content': part"))
    if content in (None, "") and "tool_calls" in message:
        return {key: value for key, value in message.items() if key != "content"}
    if not isinstance(content, str):
        raise BadRow(f"needs text as 'content', not {kind(content)}")
    if not content.strip():
        raise BadRow("has empty 'content'")
    if has_half_pair(content):
        raise BadRow("has half a surrogate pair in 'content', which no tokenizer can read")
    return {**message, "content": content}


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = repr(part.get("type")) if isinstance(part, dict) else kind(part)
    raise BadRow(f'is {found}; only {{"type": "text", "text": "..."}} can be learned')


def _other_faults(message: Message) -> list[str]:
    """What is wrong with the keys beside role and content."""
    faults = []
    if "weight" in message and not _is_weight(message["weight"]):
        faults.append(f"has the weight {message['weight']!r}; write a number from 0 upwards")
    if "tool_calls" in message and message.get("role") in ("system", "user", "tool"):
        faults.append(f"has tool calls, but is from the {message['role']}, not the assistant")
    for key, value in message.items():
        if key not in ("role", "content", *_SPECIAL) and not isinstance(value, str):
            close = difflib.get_close_matches(key, _SPECIAL, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            faults.append(
                f"has '{key}' with {kind(value)}; only keys with text are supported{hint}"
            )
    return faults


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _order_faults(messages: list[Message], label: str) -> list[str]:
    """Tool messages that answer nothing."""
    faults = []
    before = ""
    calls: set[str] = set()
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            calls = {call["id"] for call in message.get("tool_calls", []) if "id" in call}
        if message["role"] == "tool":
            fault = _answer_fault(message, before, calls)
            faults += [f"{label} {number} {fault}"] if fault else []
        before = message["role"]
    return faults


def _answer_fault(message: Message, before: str, calls: set[str]) -> str | None:
    """What is wrong with a tool message behind a message from `before` and calls of these ids."""
    # Some data sets write calls as plain text, so an assistant's message without any may be one.
    if before not in ("assistant", "tool"):
        place = f"follows one from the {before}" if before else "is the first"
        return f"is from the tool, but {place}; the assistant's call must come before it"
    answered = message.get("tool_call_id")
    if calls and answered is not None and answered not in calls:
        return f"answers the call {answered!r}, but before it are {', '.join(sorted(calls))}"
    return None
