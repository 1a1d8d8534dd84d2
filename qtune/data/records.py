"""What readers of files have in common: records with their number, and places that are broken.

A reader is a function of a path and of the number of records to pass over. It yields (number,
record) in order; the number is the line where the record begins, or its position in formats without
lines, from 1. A syntax mistake is yielded in place of a record, so that those behind it are found,
too; UserError is for files that cannot be read at all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from qtune.errors import UserError


@dataclass(frozen=True)
class Broken:
    """Stands for a record that cannot be parsed, and says why and at which column."""

    problem: str
    column: int | None = None


Records = Iterator[tuple[int, Any]]
Reader = Callable[[Path, int], Records]


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file, open for reading. UserError: it cannot be."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """The file, open for reading as UTF-8, with its line ends. UserError: it cannot be."""
    with opened(path) as file:
        yield TextIOWrapper(file, encoding="utf-8-sig", newline="")


def not_utf8(error: UnicodeDecodeError) -> Broken:
    """The mistake of a text that is no UTF-8."""
    byte = error.object[error.start]
    return Broken(f"not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")


def first_not_utf8(path: Path) -> tuple[int, Broken]:
    """(line, mistake) where a file that is known not to be UTF-8 stops to be."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, not_utf8(error)
    raise AssertionError(f"{path} is UTF-8")
