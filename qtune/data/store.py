"""Tokenised samples in a file that every process maps: made once, read in microseconds.

The file is Arrow IPC (`writer.py`); reading it costs page cache that all processes of a machine
share. It lies in a folder named after the key of what it was made from (`identity.py`); the folder
appears complete or not at all (`qtune.cache`). Beside it, `notes.json` keeps what was found out
while making it.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qtune.cache import build_once, cache_folder, wait_for
from qtune.data.chunk import Chunk, Hashes, Ints, Keys, columns, schema, update
from qtune.data.sample import Sample
from qtune.data.writer import Writer
from qtune.errors import UserError

SAMPLES, NOTES = "samples.arrow", "notes.json"


class Samples(Sequence[Sample]):
    """Samples of a mapped file, or a selection of them; indexing makes one, a slice maps on.

    `sha256` identifies their content in their order: ids, weights and labels, not places.
    """

    def __init__(self, chunks: Sequence[Chunk], sha256: str, rows: Ints | None = None) -> None:
        self._chunks, self.sha256 = chunks, sha256
        self._starts = list(accumulate(map(len, chunks), initial=0))
        self._rows: Ints = np.arange(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        return self._chunks[chunk].sample(row - self._starts[chunk])

    def select(self, indices: npt.ArrayLike) -> "Samples":
        """The samples at these indices, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256(self.sha256.encode() + chosen.tobytes())
        return Samples(self._chunks, digest.hexdigest(), self._rows[chosen])

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of every sample with all its parts, int64 [N]."""
        return self._column("lengths")

    @cached_property
    def num_targets(self) -> Ints:
        """Learned tokens of every sample, int64 [N]."""
        return self._column("num_targets")

    @property
    def labels(self) -> Ints:
        """`chunk.GOOD`, BAD or NO_LABEL for every sample, [N]."""
        return self._column("labels")

    @property
    def whole(self) -> Keys:
        """Hash of the row that begins with each sample, uint64 [N]; 0 in its further samples."""
        return self._column("whole")

    @property
    def prompt(self) -> Keys:
        """Hash of that row's messages before the last, uint64 [N]."""
        return self._column("prompt")

    def _column(self, name: str) -> npt.NDArray[Any]:
        every: npt.NDArray[Any] = np.concatenate([getattr(chunk, name) for chunk in self._chunks])
        return every[self._rows]


def collected(samples: Iterable[tuple[Sample, Hashes]]) -> Samples:
    """The samples in memory, with the hashes of the rows that begin with them."""
    import pyarrow as pa

    kept = list(samples)
    digest = hashlib.sha256()
    for sample, _ in kept:
        update(digest, sample)
    batch = pa.RecordBatch.from_pydict(columns(kept), schema=schema())
    return Samples([Chunk(batch)], digest.hexdigest())


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = accumulate((part._starts[-1] for part in parts), initial=0)
    rows = [part._rows + start for part, start in zip(parts, starts, strict=False)]
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode())
    chunks = [chunk for part in parts for chunk in part._chunks]
    return Samples(chunks, digest.hexdigest(), np.concatenate(rows))


@dataclass(frozen=True)
class Stored:
    """Samples of a source, and the notes that were taken when they were made."""

    samples: Samples
    notes: dict[str, Any]


def stored(
    name: str, key: str, fill: Callable[[Writer], dict[str, Any]], *, builds: bool = True
) -> Stored:
    """What `key` stands for, from the cache; where it is not there, `fill` writes it first.

    `fill` adds samples to a Writer and returns notes that JSON can hold. With `builds` false, the
    process waits for another one to make it. UserError: the cache cannot be written, or the folder
    there is damaged; and whatever `fill` raises, with nothing left behind.
    """
    folder = cache_folder() / "data" / f"{name}-{key[:16]}"

    def build(partial: Path) -> None:
        writer = Writer(partial / SAMPLES)
        notes = fill(writer)
        digest = writer.close()
        content = {"sha256": digest, "size_bytes": (partial / SAMPLES).stat().st_size}
        (partial / NOTES).write_text(json.dumps({**content, "notes": notes}), encoding="utf-8")

    return opened(build_once(folder, build) if builds else wait_for(folder))


def opened(folder: Path) -> Stored:
    """The samples in a folder that `stored` made; UserError: they are not as they were written."""
    import pyarrow as pa

    path = folder / SAMPLES
    try:
        content = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        if path.stat().st_size != content["size_bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        chunks = [Chunk(file.get_batch(i)) for i in range(file.num_record_batches)]
        return Stored(Samples(chunks, content["sha256"]), content["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the tokenised data in {folder} is damaged ({error}); remove the folder"
        ) from error
