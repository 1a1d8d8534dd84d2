"""The samples of every optimizer step, for all processes together.

A feed hands out the same batches in every process, whatever their number; each process takes its
share of them (`data/order.py`). What it needs to go on after an interruption is in `state`, which a
checkpoint keeps: nothing for stored samples, whose batches are a pure function of the step, and the
position in each source for streams (`data/stream.py`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

from qtune.data.mix import Mix
from qtune.data.sample import Sample


class Feed(Protocol):
    """Where the training loop gets its samples."""

    @property
    def sha256(self) -> str:
        """What the samples are made of, as a hash; a resumed run must find the same."""

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; None where nobody knows."""

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, or the first ones of a stream."""

    @property
    def shares(self) -> Sequence[float]:
        """What part of the samples each source gives."""

    def batch(self, step: int) -> list[Sample]:
        """The samples of optimizer step `step`, counted from 0."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on behind the last batch, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a feed was that had this state."""


class StoredFeed:
    """Samples that are all there, in a new order every epoch; epochs follow without a gap."""

    def __init__(self, mix: Mix, batch_size: int, seed: int) -> None:
        self.samples = mix
        self.sha256 = mix.sha256
        self.num_rows, self.shares = len(mix), mix.shares
        self._batch_size, self._seed = batch_size, seed

    def batch(self, step: int) -> list[Sample]:
        """The samples of a step: a pure function of seed and step."""
        places = range(step * self._batch_size, (step + 1) * self._batch_size)
        return [self.samples[self._row(*divmod(place, self.num_rows))] for place in places]

    def state(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _row(self, epoch: int, place: int) -> int:
        return int(self.samples.epoch(self._seed, epoch)[place])
