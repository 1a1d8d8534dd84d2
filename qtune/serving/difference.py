"""What is not as qtune.json says, named so that one can go and look."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One thing that differs: a file, key, module, token or golden prompt, and how.

    After one that `breaks` it the folder cannot be loaded.
    """

    where: str
    what: str
    breaks: bool = False

    def __str__(self) -> str:
        """As a line of the list that a check ends with."""
        return f"{self.where}: {self.what}"


def values(where: str, was: Any, now: Any, key: str = "") -> Iterator[Difference]:
    """Where two JSON values differ, by key; `where` is the file that they are from."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*was, *now]):
            inner = f"{key}.{name}" if key else str(name)
            yield from values(where, was.get(name, _ABSENT), now.get(name, _ABSENT), inner)
    elif was is _ABSENT:
        yield Difference(where, f"{key} is {_short(now)}, and was not there")
    elif now is _ABSENT:
        yield Difference(where, f"{key} is missing, and was {_short(was)}")
    elif was != now or isinstance(was, bool) != isinstance(now, bool):
        yield Difference(where, f"{key} is {_short(now)}, and was {_short(was)}")


def length_in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
