"""A JSON list of rows, parsed item by item from a window of the file.

Python's parser wants a whole text, so an item that ends with the window may be incomplete: it is
parsed again with more of the file, twice as much each time. A mistake looks the same at first;
hence the limit on how much is read for one item.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qtune.data.records import Broken, Records, first_not_utf8, opened_text

WINDOW = 1 << 20
LONGEST_ITEM = 1 << 26
_BEHIND_ITEM = tuple(" \t\r\n,]")


def read(path: Path, skip: int = 0) -> Records:
    """The items of the list in a file, numbered by the line where they begin."""
    with opened_text(path) as file:
        try:
            for index, item in enumerate(_items(_Window(file))):
                if index >= skip:
                    yield item
        except _Mistake as mistake:
            yield mistake.line, Broken(f"not valid JSON: {mistake}", mistake.column)
        except UnicodeDecodeError:
            yield first_not_utf8(path)


class _Mistake(Exception):
    """A mistake of syntax at (line, column)."""

    def __init__(self, place: tuple[int, int], problem: str) -> None:
        super().__init__(problem)
        self.line, self.column = place


def _items(window: "_Window") -> Iterator[tuple[int, Any]]:
    if not window.next():
        return
    if window.next() != "[":
        yield 1, Broken("must be a list of rows; one object per line goes in .jsonl")
        return
    window.at += 1
    while window.next() != "]":
        line, _ = window.place()
        yield line, window.item()
        _to_next_item(window)
    window.at += 1
    if window.next():
        raise _Mistake(window.place(), "text behind the end of the list")


def _to_next_item(window: "_Window") -> None:
    """Go to where the next item begins, or to the closing bracket."""
    if window.next() == "]":
        return
    place = window.place()
    if window.next() != ",":
        raise _Mistake(place, "Expecting ',' or ']'")
    window.at += 1
    if window.next() == "]":
        raise _Mistake(place, "a comma before the closing bracket")


class _Window:
    """A stretch of a file's text; what lies before `at` has been parsed."""

    def __init__(self, file: TextIO) -> None:
        self.text = ""
        self.at = 0
        self._file = file
        # Line and column of a position that `at` has passed, from which the next is counted.
        self._known, self._line, self._column = 0, 1, 1
        self._decode = json.JSONDecoder().raw_decode

    def place(self) -> tuple[int, int]:
        """(line, column) in the file of `at`."""
        self._line, self._column = self._place(self.at)
        self._known = self.at
        return self._line, self._column

    def _place(self, position: int) -> tuple[int, int]:
        breaks = self.text.count("\n", self._known, position)
        if not breaks:
            return self._line, self._column + position - self._known
        return self._line + breaks, position - self.text.rindex("\n", self._known, position)

    def next(self) -> str:
        """The next character that is no white space, at which it stops; empty at the end."""
        while True:
            while self.text[self.at : self.at + 1] in (" ", "\t", "\n", "\r"):
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def item(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise _Mistake(self._place(error.pos), error.msg) from error
                continue
            # Numbers of thousands of digits, and lists nested as deep.
            except (ValueError, RecursionError) as error:
                raise _Mistake(self.place(), str(error)) from error
            # The beginning of a number is a number, too.
            if self.text[end : end + 1] in _BEHIND_ITEM or not self._more():
                self.at = end
                return value

    def _more(self) -> bool:
        """Drop what has been parsed and read on; False at the end, or where it is too long."""
        if len(self.text) - self.at > LONGEST_ITEM:
            return False
        found = self._file.read(max(WINDOW, len(self.text) - self.at))
        if found:
            self.place()
            self.text, self.at, self._known = self.text[self.at :] + found, 0, 0
        return bool(found)
