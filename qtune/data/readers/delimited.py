"""Tables as text: CSV with commas, TSV with tabs; the first line names the columns.

All cells are text. Quoting is checked: Python's reader, left to itself, would take a stray quote
for the beginning of a cell that swallows the lines behind it.
"""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qtune.data.records import Broken, Records, first_not_utf8, opened_text
from qtune.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read(path: Path, skip: int = 0) -> Records:
    """The rows of a table as objects of text, numbered by the line where they begin."""
    # The default of 128 KiB is less than a long conversation.
    csv.field_size_limit(sys.maxsize)
    delimiter = _DELIMITERS[path.suffix]
    with opened_text(path) as file:
        lines = _cells(file, delimiter)
        try:
            _, header = next(lines, (1, []))
            if isinstance(header, Broken):
                yield 1, header
                return
            _check_header(path, header, delimiter)
            for index, (number, cells) in enumerate(lines):
                if index >= skip:
                    yield number, _record(header, cells)
        except UnicodeDecodeError:
            yield first_not_utf8(path)


def _cells(file: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | Broken]]:
    """(line, cells) of every row that is not blank; a mistake of quoting is the last."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, Broken(f"the quotes of this row do not match: {error}")
            return
        if cells is None:
            return
        if cells:
            yield number, cells


def _record(header: list[str], cells: list[str] | Broken) -> Any:
    if isinstance(cells, Broken):
        return cells
    if len(cells) != len(header):
        return Broken(
            f"has {len(cells)} cells, but the first line names {len(header)} columns; put cells "
            "with a delimiter or a line break in double quotes"
        )
    return dict(zip(header, cells, strict=True))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Raise UserError unless the first line names the columns."""
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or not all(header):
        problem = f"names '{repeated[0]}' twice" if repeated else "has a column without a name"
        raise UserError(f"{path}:1: the first line {problem}; it must name the columns")
    used = [other for other in (";", ",", "\t") if other in "".join(header)]
    if len(header) == 1 and used:
        raise UserError(
            f"{path}:1: the columns are divided by {used[0]!r}, but must be by {delimiter!r} in a "
            f"{path.suffix} file"
        )
