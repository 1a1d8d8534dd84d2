"""A row of data: one conversation, checked, with the place it came from.

Every mistake is reported with that place, and several at once: a file with one bad row usually
has more. Checks look only at what is needed to render a conversation; what a chat template makes
of it is asked later (`chat.py`, `lint.py`).
"""

from dataclasses import dataclass
from typing import Any

from qtune.errors import UserError

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
}


@dataclass(frozen=True)
class Row:
    """One conversation: `messages` with role and content, and where it was read."""

    source: str
    number: int
    messages: list[dict[str, str]]

    @property
    def place(self) -> str:
        """`source:number`, the line of a text file or the row of anything else."""
        return f"{self.source}:{self.number}"


class Problems:
    """Mistakes found so far; `add` raises them all when there are ten."""

    limit = 10

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, place: str, text: str) -> None:
        """Note a mistake. Raises UserError with all of them once the limit is reached."""
        self._lines.append(f"{place}: {text}")
        if len(self._lines) == self.limit:
            self._lines.append(f"stopped after {self.limit} problems; there may be more")
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise UserError, one line per mistake, unless there is none."""
        if self._lines:
            raise UserError("\n".join(self._lines))


def checked_row(source: str, number: int, value: Any, problems: Problems) -> Row | None:
    """The row in a parsed JSON value, or None after telling `problems` what is wrong with it."""
    faults = _row_faults(value)
    for fault in faults:
        problems.add(f"{source}:{number}", fault)
    if faults:
        return None
    return Row(source, number, [_without_nulls(message) for message in value["messages"]])


_SHAPE = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


def _row_faults(value: Any) -> list[str]:
    """What is wrong with a row, in words."""
    if not isinstance(value, dict):
        return [f"a row must be an object with 'messages', not {_kind(value)}"]
    messages = value.get("messages")
    if messages is None:
        keys = ", ".join(f"'{key}'" for key in value) or "no keys at all"
        return [f"no 'messages' in this row (it has {keys}); {_SHAPE}"]
    if not isinstance(messages, list):
        return [f"'messages' must be a list, not {_kind(messages)}; {_SHAPE}"]
    if not messages:
        return [f"'messages' is empty; {_SHAPE}"]
    faults = [
        f"message {i} {fault}"
        for i, message in enumerate(messages, start=1)
        for fault in _message_faults(message)
    ]
    if not faults and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        faults = [f"the last message is from the {role}; only an assistant's can be learned"]
    return faults


def _message_faults(message: Any) -> list[str]:
    """What is wrong with one message, in words that follow "message 3"."""
    if not isinstance(message, dict):
        return [f"must be an object with 'role' and 'content', not {_kind(message)}"]
    found = _role_faults(message.get("role")) + _content_faults(message.get("content"))
    for key, value in message.items():
        if key not in ("role", "content") and not isinstance(value, str | None):
            found.append(f"has '{key}' with {_kind(value)}; only keys with text are supported")
    return found


def _role_faults(role: Any) -> list[str]:
    if role in ROLES:
        return []
    allowed = f"allowed are {', '.join(ROLES)}"
    if role is None:
        return [f"has no 'role'; {allowed}"]
    meant = _OTHER_WORDS.get(role) if isinstance(role, str) else None
    return [f"has the unknown role {role!r}; {allowed}" + (f" (here: '{meant}')" if meant else "")]


def _content_faults(content: Any) -> list[str]:
    if not isinstance(content, str):
        return [f"needs text as 'content', not {_kind(content)}"]
    if not content.strip():
        return ["has empty 'content'"]
    if any("\ud800" <= character <= "\udfff" for character in content):
        return ["has half a surrogate pair in 'content', which no tokenizer can read"]
    return []


def _without_nulls(message: dict[str, Any]) -> dict[str, str]:
    """Columns of a table name every key in every message; the absent ones are null."""
    return {key: value for key, value in message.items() if value is not None}


def _kind(value: Any) -> str:
    """A JSON word for the type of a value."""
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
