"""Samples written into an Arrow IPC file, a record batch at a time.

So making a file takes no more memory than one batch, however many samples there are.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtune.data.chunk import NO_ROW, Hashes, columns, schema, update
from qtune.data.sample import Sample
from qtune.errors import UserError

# a record batch is written when it has so many tokens or samples
BATCH_TOKENS = 1 << 20
BATCH_SAMPLES = 1 << 12


class Writer:
    """Writes samples into a file, a record batch at a time; UserError: it cannot be written."""

    def __init__(self, path: Path) -> None:
        # Imported here: the package takes a while, and help and recipes do without it.
        import pyarrow as pa

        self._path, self._schema = path, schema()
        with self._writing():
            self._sink = pa.OSFile(str(path), "wb")
            self._file = pa.ipc.new_file(self._sink, self._schema)
        self._pending: list[tuple[Sample, Hashes]] = []
        self._num_tokens = self._num_batches = 0
        self._digest = hashlib.sha256()

    def add(self, sample: Sample, hashes: Hashes = NO_ROW) -> None:
        """Write a sample; `hashes` are those of the row that begins with it."""
        self._pending.append((sample, hashes))
        self._num_tokens += sample.num_tokens
        update(self._digest, sample)
        if self._num_tokens >= BATCH_TOKENS or len(self._pending) >= BATCH_SAMPLES:
            self._flush()

    def close(self) -> str:
        """The SHA-256 of all samples, in hex; the file is complete then."""
        if self._pending or not self._num_batches:
            self._flush()
        with self._writing():
            self._file.close()
            self._sink.close()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        import pyarrow as pa

        batch = pa.RecordBatch.from_pydict(columns(self._pending), schema=self._schema)
        with self._writing():
            self._file.write_batch(batch)
        self._pending, self._num_tokens = [], 0
        self._num_batches += 1

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises UserError where the disk is full."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error}); make room, or point QTUNE_CACHE at "
                "a larger disk"
            ) from error
