"""How one process goes through rows: its share of them, in micro-batches.

Sharded models and objectives that look at all rows talk to the other processes in every forward
pass, so all processes take the same number of passes. Each can work out the shares of the others;
one that has fewer micro-batches splits some, and where it has no rows left to split it runs
batches in which nothing is learned and nothing counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from accelerate import Accelerator

from qtune.data.collate import ROW_MULTIPLE, Batch, collate
from qtune.data.order import micro_batches, share
from qtune.data.sample import Sample


class Batches:
    """Called with the rows of all processes, gives this one's micro-batches."""

    def __init__(self, accelerator: Accelerator, max_tokens: int, *, packing: bool) -> None:
        self._accelerator = accelerator
        self._max_tokens, self._packing = max_tokens, packing

    def __call__(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """Micro-batches on the device of this process; as many as in every other process."""
        groups = [self._groups(samples, i) for i in range(self._accelerator.num_processes)]
        own, number = groups[self._accelerator.process_index], max(map(len, groups))
        own = split_up(own, number)
        for group in own:
            yield self._collate(group)
        for _ in range(number - len(own)):
            shortest = min(samples, key=lambda sample: sample.num_tokens)
            yield nothing_learned(self._collate([shortest]))

    def _groups(self, samples: Sequence[Sample], process: int) -> list[list[Sample]]:
        own = share(samples, process, self._accelerator.num_processes)
        return micro_batches(own, self._max_tokens, packing=self._packing)

    def _collate(self, group: Sequence[Sample]) -> Batch:
        device = self._accelerator.device
        return collate(group, device, multiple=ROW_MULTIPLE, packing=self._packing)


def split_up(groups: list[list[Sample]], number: int) -> list[list[Sample]]:
    """The groups with the fullest ones halved until there are `number`, or as many as can be."""
    groups = list(groups)
    while len(groups) < number:
        fullest = max(range(len(groups)), key=lambda i: len(groups[i]), default=0)
        if not groups or len(groups[fullest]) == 1:
            break
        group = groups.pop(fullest)
        middle = len(group) // 2
        groups[fullest:fullest] = [group[:middle], group[middle:]]
    return groups


def nothing_learned(batch: Batch) -> Batch:
    """The batch as if all of its samples were there to fill the row up."""
    none = batch.targets[:0]
    return replace(
        batch,
        targets=none,
        predicts=none,
        sample_of=none,
        weights=None,
        places=[],
        num_parts=[],
        labels=[],
    )
