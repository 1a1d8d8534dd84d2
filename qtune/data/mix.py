"""Several sets of samples as one, and which of them each place of an epoch takes.

An epoch has as many places as there are rows. Without weights every row has one of them. With
weights a source fills its share, whatever its size: it goes through permutations of its own rows,
one after the other, and goes on in the next epoch where it stopped in this one. So no row comes
twice before all of its source have come once. All of it is a pure function of seed and epoch.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from qtune.data.order import order
from qtune.data.sample import Sample
from qtune.errors import UserError


class Part(Protocol):
    """Samples that are all there: `data/store.py` has those on disk."""

    @property
    def sha256(self) -> str:
        """What the samples are made of, as a hash."""

    @property
    def lengths(self) -> Any:
        """Tokens of each sample, int64 [N]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Mix(Sequence[Sample]):
    """All samples of the parts, one part after the other, and the order to take them in.

    A weight of None stands for the number of rows of that part. UserError: a part has so little
    weight that it gets no place in an epoch.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float | None]) -> None:
        self._parts = list(parts)
        self._starts = list(accumulate(map(len, parts), initial=0))
        self.lengths: Tensor = torch.cat([torch.as_tensor(part.lengths) for part in parts])
        """Tokens of each sample, int64 [N]."""
        given = [part.sha256 for part in parts], [None if w is None else float(w) for w in weights]
        self.sha256 = hashlib.sha256(repr(given).encode()).hexdigest()
        """Hash of the samples and their weights."""
        sizes = [len(part) for part in parts]
        counted = [n if w is None else w for n, w in zip(sizes, weights, strict=True)]
        self.shares = [weight / sum(counted) for weight in counted]
        """Of each part in an epoch, before it is rounded to whole places."""
        self._places = self._quotas(weights)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, at) - 1
        return self._parts[number][at - self._starts[number]]

    def epoch(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in their order, as int64 [N] indices of this sequence."""
        return self._epoch(seed, epoch)

    def _make_epoch(self, seed: int, epoch: int) -> Tensor:
        shuffled = order(len(self), seed, epoch)
        if self._places == [len(part) for part in self._parts]:
            return shuffled
        taken = [
            start + _walk(len(part), places, seed, epoch)
            for part, places, start in zip(self._parts, self._places, self._starts, strict=False)
        ]
        return torch.cat(taken)[shuffled]

    def _quotas(self, weights: Sequence[float | None]) -> list[int]:
        """Places of each part in an epoch: shares rounded to the largest remainders."""
        exact = [share * len(self) for share in self.shares]
        places = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: places[i] - exact[i])
        for i in by_remainder[: len(self) - sum(places)]:
            places[i] += 1
        for part, count, weight in zip(self._parts, places, weights, strict=True):
            if not count:
                raise UserError(
                    f"data.train: the source of {part[0].place} gets none of the {len(self)} "
                    f"places of an epoch with a weight of {weight}; raise it, or leave it out"
                )
        return places


def _walk(num_rows: int, places: int, seed: int, epoch: int) -> Tensor:
    """`places` rows of a part, int64, going on where the epoch before stopped."""
    first, end = epoch * places, (epoch + 1) * places
    passes = range(first // num_rows, -(-end // num_rows))
    walked = torch.cat([order(num_rows, seed, number) for number in passes])
    start = first - passes.start * num_rows
    return walked[start : start + places]
