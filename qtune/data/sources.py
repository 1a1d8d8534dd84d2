"""Where rows come from, by the form of a source's path, and how they are read.

    demo:train, demo:train?rows=500                    made by `demo.py`
    train.jsonl, data/*.parquet, folder, folder:train  local files (`files.py`)
    org/name, org/name:split, org/name:config:split    a data set on the hub (`hub.py`)

Rows are read one after the other, whatever the size of the source. A mistake in one does not end
the reading, so that several are told at once.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qtune.data import demo_source, files
from qtune.data.convert import Converter
from qtune.data.hub import HubData
from qtune.data.records import Broken, Records, opened
from qtune.data.rows import Mistakes, Problems, Row
from qtune.data.values import BadRow
from qtune.errors import UserError
from qtune.recipe_data import Source


@dataclass(frozen=True)
class Position:
    """How far a source was read: its file, the records taken of that one, the rows given so far."""

    file: int = 0
    records: int = 0
    rows: int = 0


class Rows(Iterator[Row]):
    """The rows of a source; `position` is where to go on reading behind the last one given.

    Iterating raises UserError with the tenth mistake, or at the end where there are fewer; given
    `mistakes`, they go there instead, and the rows are left out.
    """

    def __init__(
        self, source: Source, *, streaming: bool, mistakes: Mistakes | None, position: Position
    ) -> None:
        self.position = position
        self._source = source
        self._problems = Problems()
        self._mistakes: Mistakes = mistakes or self._problems
        self._from_start = position == Position()
        self._converter = Converter(source)
        self._parts = _parts(source, streaming=streaming)
        self._rows = self._read()

    def __next__(self) -> Row:
        return next(self._rows)

    def _read(self) -> Iterator[Row]:
        limit = self._source.rows
        left = None if limit is None else max(0, limit - self.position.rows)
        yield from islice(self._all(), left)
        self._finish()

    def _all(self) -> Iterator[Row]:
        start, given = self.position, self.position.rows
        for index, (name, records) in enumerate(self._parts):
            if index < start.file:
                continue
            taken = start.records if index == start.file else 0
            for number, record in records(taken):
                taken += 1
                row = self._row(name, number, record)
                if row is not None:
                    given += 1
                    self.position = Position(index, taken, given)
                    yield row

    def _row(self, name: str, number: int, record: Any) -> Row | None:
        """The row in a record; None where it is left out or wrong, which has been noted then."""
        place = f"{name}:{number}"
        if isinstance(record, Broken):
            column = "" if record.column is None else f":{record.column}"
            self._mistakes.add(place + column, record.problem)
            return None
        try:
            parts = self._converter.parts(record)
        except BadRow as bad:
            for fault in bad.faults:
                self._mistakes.add(place, fault)
            return None
        return None if parts is None else Row(name, number, **vars(parts))

    def _finish(self) -> None:
        """Raises UserError for what only the end shows."""
        self._problems.raise_if_any()
        if self._from_start:
            self._converter.finish()
        if not self.position.rows:
            left = " that `where` takes" if self._source.where else ""
            raise UserError(f"{self._source.path}: holds no rows{left}")


def read(
    source: Source,
    *,
    streaming: bool = False,
    mistakes: Mistakes | None = None,
    position: Position | None = None,
) -> Rows:
    """The rows of a source behind `position`, as they are read; `streaming` downloads as little.

    Raises UserError where the source cannot be read, and while iterating (see Rows).
    """
    start = Position() if position is None else position
    return Rows(source, streaming=streaming, mistakes=mistakes, position=start)


def load(source: str | Source) -> list[Row]:
    """Every row of a source.

    Raises UserError with up to ten mistakes, each with its file and line.
    """
    return list(read(Source(path=source) if isinstance(source, str) else source))


def fingerprint(source: Source) -> str:
    """A hash, in hex, of all that decides which rows the source gives: contents and options.

    Raises UserError where the source cannot be found.
    """
    options = asdict(source)
    del options["weight"]
    given = [options, _contents(source)]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def _contents(source: Source) -> list[str]:
    """What identifies the contents; nothing for the demo, which its arguments say in full."""
    if source.path.startswith("demo:"):
        return []
    found, hub = _located(source)
    return [hub.fingerprint()] if hub else [f"{path} {_sha256(path)}" for path in found]


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(source: Source, *, streaming: bool) -> list[tuple[str, Callable[[int], Records]]]:
    """Name and reader of each file of a source, or of the one part that others have."""
    if source.path.startswith("demo:"):
        rows = demo_source.records(source.path)
        return [(source.path, lambda skip: iter(list(enumerate(rows, start=1))[skip:]))]
    found, hub = _located(source)
    if hub is not None:
        return [(source.path, partial(hub.records, streaming=streaming))]
    return [(str(path), partial(files.READERS[path.suffix], path)) for path in found]


def _located(source: Source) -> tuple[list[Path], HubData | None]:
    """The local files of a source, or else its data set on the hub."""
    path = Path(source.path).expanduser()
    found = files.find(path)
    hub = None if found else HubData.parse(source.path, source.revision)
    if not found and hub is None:
        raise UserError(files.missing(path))
    if found and source.revision is not None:
        raise UserError(
            f"{source.path}: revision is for data sets of the hub, but this is a local file"
        )
    return found, hub
