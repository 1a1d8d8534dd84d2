"""A row of data: one example, checked, with the place it came from.

Every mistake is reported with that place, and several at once: a file with one bad row usually
has more.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from qtune.errors import UserError

# Has a role and content (text, absent only beside tool_calls); weight, tool_calls, tool_call_id and
# other keys with text are optional.
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One example, checked: its conversation, and where it was read.

    A `plain` row holds texts that go to the model one after the other, without a chat template.
    `rejected` is the whole conversation that `messages` is preferred to, with the same beginning;
    `label` says whether the last answer is a good one (kto).
    """

    source: str
    number: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    plain: bool = False
    rejected: list[Message] | None = None
    label: bool | None = None

    @property
    def place(self) -> str:
        """`source:number`, the line of a text file or the row of anything else."""
        return f"{self.source}:{self.number}"


class Mistakes(Protocol):
    """Where readers report rows that are left out."""

    def add(self, place: str, text: str) -> None:
        """Note a mistake, or raise what was noted so far."""


class Problems:
    """Mistakes found so far; `add` raises them all when there are ten.

    One made again and again, as a missing column is, is told once, with where it came first and
    last.
    """

    limit = 10

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}
        self._count = 0

    def add(self, place: str, text: str) -> None:
        """Note a mistake. Raises UserError with all of them once the limit is reached."""
        self._places.setdefault(text, []).append(place)
        self._count += 1
        if self._count == self.limit:
            raise self._error(f"stopped after {self.limit} problems; there may be more")

    def raise_if_any(self) -> None:
        """Raise UserError, one line per mistake, unless there is none."""
        if self._count:
            raise self._error()

    def _error(self, *closing: str) -> UserError:
        return UserError("\n".join([*map(_told, self._places.items()), *closing]))


def _told(mistake: tuple[str, list[str]]) -> str:
    """A mistake with its place, or with the first and the last of several."""
    text, (first, *others) = mistake
    last = f" (and {len(others)} more, up to {others[-1]})" if others else ""
    return f"{first}: {text}{last}"
