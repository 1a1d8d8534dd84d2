"""Samples as columns of numbers: one chunk is one record batch of an Arrow file.

Token ids are int32. Weights are stored as runs of equal ones: a sample has a few of them, so they
take next to no room whether or not all are 0 and 1. A chunk hands out numpy views of the mapped
file; only `sample` makes Python objects, and only of one sample.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qtune.data.sample import Sample

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
# how `label` is stored
NO_LABEL, BAD, GOOD = -1, 0, 1


class Hashes(NamedTuple):
    """64-bit hashes of a row's messages, all of them and those before the last; 0: no row begins.

    Rows are told apart by these. Among a hundred million rows the chance that any two different
    ones agree is 0.03 %, and would cost no more than a wrong warning.
    """

    whole: int
    prompt: int


# those of a sample that is not the first of its row
NO_ROW = Hashes(0, 0)


def schema() -> Any:
    """The columns of a file of samples, as a pyarrow.Schema."""
    import pyarrow as pa

    def part(name: str) -> list[tuple[str, Any]]:
        return [
            (f"{name}ids", pa.list_(pa.int32())),
            (f"{name}run_lengths", pa.list_(pa.int32())),
            (f"{name}run_weights", pa.list_(pa.float64())),
            (f"{name}num_cut", pa.int32()),
        ]

    row = [("place", pa.string()), ("label", pa.int8()), ("num_targets", pa.int64())]
    hashes = [("whole", pa.uint64()), ("prompt", pa.uint64())]
    # a sample that is no pair has no ids in the rejected part
    return pa.schema(row + hashes + part("") + part("rejected_"))


def columns(samples: Iterable[tuple[Sample, Hashes]]) -> dict[str, list[Any]]:
    """The samples' values by column, as `schema` names them."""
    values: dict[str, list[Any]] = {name: [] for name in schema().names}
    for sample, hashes in samples:
        values["place"].append(sample.place)
        values["label"].append(_label(sample.label))
        values["num_targets"].append(sample.num_targets)
        values["whole"].append(hashes.whole)
        values["prompt"].append(hashes.prompt)
        _add_part(values, "", sample)
        _add_part(values, "rejected_", sample.rejected)
    return values


def _label(good: bool | None) -> int:
    if good is None:
        return NO_LABEL
    return GOOD if good else BAD


def _add_part(values: dict[str, list[Any]], name: str, part: Sample | None) -> None:
    runs = weight_runs(part.weights) if part is not None else []
    values[f"{name}ids"].append([] if part is None else part.ids)
    values[f"{name}run_lengths"].append([length for length, _ in runs])
    values[f"{name}run_weights"].append([weight for _, weight in runs])
    values[f"{name}num_cut"].append(0 if part is None else part.num_cut)


def weight_runs(weights: Sequence[float]) -> list[tuple[int, float]]:
    """(length, weight) of each stretch of equal weights."""
    return [(sum(1 for _ in stretch), weight) for weight, stretch in groupby(weights)]


def update(digest: "hashlib._Hash", sample: Sample) -> None:
    """Take a sample's ids, weights and label into a running hash."""
    for part in sample.parts:
        digest.update(repr((list(part.ids), weight_runs(part.weights))).encode())
    digest.update(repr(sample.label).encode())


def _numbers(column: Any) -> npt.NDArray[Any]:
    """A column of numbers as numpy sees it in place; pyarrow's own way imports pandas for it."""
    return np.from_dlpack(column)


class Lists:
    """A column of lists: all values end to end, and where each list begins."""

    def __init__(self, column: Any) -> None:
        self._starts = _numbers(column.offsets)
        self._values = _numbers(column.values)

    def __getitem__(self, index: int) -> list[Any]:
        values: list[Any] = self._values[self._starts[index] : self._starts[index + 1]].tolist()
        return values

    @property
    def lengths(self) -> Ints:
        """Length of every list, int64 [n]."""
        return np.diff(self._starts).astype(np.int64)


class Chunk:
    """Samples of one record batch; columns are looked up when they are first needed."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def sample(self, index: int) -> Sample:
        """One sample."""
        place, label = self._place[index].as_py(), int(self.labels[index])
        rejected = self._rejected.sample(place, index) if self._rejected.lengths[index] else None
        good = None if label == NO_LABEL else label == GOOD
        return self._chosen.sample(place, index, rejected, good)

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of every sample with all its parts, int64 [n]."""
        return self._chosen.lengths + self._rejected.lengths

    @cached_property
    def labels(self) -> Ints:
        """GOOD, BAD or NO_LABEL for every sample, [n]."""
        return self._column("label")

    @property
    def num_targets(self) -> Ints:
        """Learned tokens of every sample, int64 [n]."""
        return self._column("num_targets")

    @property
    def whole(self) -> Keys:
        """Hash of the row that begins with the sample, uint64 [n]; 0 in its further samples."""
        return self._column("whole")

    @property
    def prompt(self) -> Keys:
        """Hash of that row's messages before the last, uint64 [n]."""
        return self._column("prompt")

    @cached_property
    def _place(self) -> Any:
        return self._batch.column("place")

    @cached_property
    def _chosen(self) -> "_Parts":
        return _Parts(self._batch, "")

    @cached_property
    def _rejected(self) -> "_Parts":
        return _Parts(self._batch, "rejected_")

    def _column(self, name: str) -> npt.NDArray[Any]:
        return _numbers(self._batch.column(name))


class _Parts:
    """One part of every sample of a record batch."""

    def __init__(self, batch: Any, name: str) -> None:
        self._ids = Lists(batch.column(f"{name}ids"))
        self._run_lengths = Lists(batch.column(f"{name}run_lengths"))
        self._run_weights = Lists(batch.column(f"{name}run_weights"))
        self._num_cut = _numbers(batch.column(f"{name}num_cut"))
        self.lengths = self._ids.lengths

    def sample(
        self, place: str, index: int, rejected: Sample | None = None, label: bool | None = None
    ) -> Sample:
        """The part as a sample."""
        weights: list[float] = []
        runs = zip(self._run_lengths[index], self._run_weights[index], strict=True)
        for length, weight in runs:
            weights += [weight] * length
        num_cut = int(self._num_cut[index])
        return Sample(place, self._ids[index], weights, num_cut, rejected, label)
