"""What a format of rows is, and how it is found.

A format is one file in `formats/` whose name is the word used in recipes: the names of its columns
and a function from a record to the parts of a row. Which format a record has is told from its
columns alone, each record for itself, so that reading can go on in the middle of a file.
"""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from qtune.data.rows import Message

Record = dict[str, Any]

# Those with more columns first: a preference row may have the chosen answer as messages, too, and
# alpaca rows often come with the whole as text.
FORMAT_NAMES = (
    "preference",
    "label",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
)


@dataclass(frozen=True)
class Parts:
    """What a format makes of a record: a `Row` but for its place."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    plain: bool = False
    rejected: list[Message] | None = None
    label: bool | None = None


@dataclass(frozen=True)
class Format:
    """The columns of a format, and what it makes of a record that has them.

    A record must have all columns of one of the sets in `needs`; `takes` are those it may have.
    `parts` raises BadRow where they hold something else than they should.
    """

    needs: tuple[frozenset[str], ...]
    takes: frozenset[str]
    parts: Callable[[Record], Parts]

    def fits(self, columns: Set[str]) -> bool:
        """Whether all columns are there that the format needs."""
        return any(need <= columns for need in self.needs)

    @property
    def columns(self) -> frozenset[str]:
        """All columns that the format reads."""
        return self.takes.union(*self.needs)


@cache
def load_format(name: str) -> Format:
    """The format of that name."""
    found: Format = import_module(f"qtune.data.formats.{name}").FORMAT
    return found


def detect(columns: Iterable[str]) -> str | None:
    """The name of the first format whose columns are all there; None where there is none."""
    return _detect(frozenset(columns))


@cache
def _detect(columns: frozenset[str]) -> str | None:
    return next((name for name in FORMAT_NAMES if load_format(name).fits(columns)), None)


def all_columns() -> frozenset[str]:
    """The columns of all formats."""
    return frozenset().union(*(load_format(name).columns for name in FORMAT_NAMES))
