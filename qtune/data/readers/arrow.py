"""Columnar files: Parquet, and Arrow files in the stream form (of `datasets`) or the file form.

Both are read a batch of rows at a time. Rows are numbered by position.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.data.records import Broken, Records, not_utf8
from qtune.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

# rows; conversations are long, and as Python objects several times as long
BATCH = 256
READ_BYTES = 1 << 20


def read_parquet(path: Path, skip: int = 0) -> Records:
    """The rows of a Parquet file."""
    # Imported here: the package takes a while, and text files do without it.
    import pyarrow
    from pyarrow import parquet

    try:
        # Left to itself, it would read all row groups ahead.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    with file:
        first = passed = 0
        while first < file.num_row_groups:
            rows = file.metadata.row_group(first).num_rows
            if passed + rows > skip:
                break
            first, passed = first + 1, passed + rows
        groups = range(first, file.num_row_groups)
        yield from _rows(file.iter_batches(BATCH, row_groups=groups), passed, skip)


def read_arrow(path: Path, skip: int = 0) -> Records:
    """The rows of an Arrow file."""
    import pyarrow

    try:
        source = pyarrow.memory_map(str(path))
        batches = _batches(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Arrow file: {error}") from error
    with source:
        yield from _rows(batches, 0, skip)


def _batches(source: Any) -> Iterator["RecordBatch"]:
    """The record batches of a mapped file, in the stream form or else the file form."""
    import pyarrow

    try:
        stream = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        file = pyarrow.ipc.open_file(source)
        return (file.get_batch(number) for number in range(file.num_record_batches))
    return iter(stream)


def _rows(batches: Iterable["RecordBatch"], passed: int, skip: int) -> Records:
    """The rows of the batches behind `passed` rows, from row `skip` on, counted from 0."""
    import pyarrow

    try:
        for batch in batches:
            start = min(max(0, skip - passed), batch.num_rows)
            for at in range(start, batch.num_rows, BATCH):
                values = _values(batch.slice(at, BATCH))
                yield from enumerate(values, start=passed + at + 1)
            passed += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield passed + 1, Broken(f"the file is damaged from here on: {error}")


def _values(batch: "RecordBatch") -> list[Any]:
    """The rows of a batch; a text that is no UTF-8 makes its row a mistake."""
    try:
        return [cells_without_nulls(row) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [not_utf8(error)]
    return [value for i in range(batch.num_rows) for value in _values(batch.slice(i, 1))]


def cells_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row, its objects without keys that are null, which in a table stand for absent ones.

    All objects of a column have all keys there: a tool would get every other tool's parameters.
    """
    return {column: _without_nulls(cell) for column, cell in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
