"""Who computes which part of an attention call: tasks, and a fair share of them for each thread.

A task is a run of query blocks of one sample under one key head. Under a causal mask a sample costs
the square of its length, so tasks are weighed by the blocks of scores they take, and the heaviest
are dealt first, each to the thread that has least to do. No result depends on who computes it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# queries, and keys, of a block of scores
BLOCK = 32
# more than any sample has tokens
NO_WINDOW = 1 << 30


class Task(NamedTuple):
    """Query blocks `first` to `stop` of a sample, for the query heads from `head` on."""

    row: int
    length: int
    head: int
    first: int
    stop: int


TASK_BYTES = 8 * len(Task._fields)


class Schedule(NamedTuple):
    """What a kernel is given: the tasks sorted by threads, and where those of each begin."""

    tasks: Tensor
    """int64 [tasks, 5], the fields of `Task`."""
    starts: Tensor
    """int64 [threads + 1]."""
    most_blocks: int
    """Blocks of the longest sample."""


@lru_cache(maxsize=64)
def schedule(
    lengths: tuple[int, ...], heads: range, window: int, run: int, workers: int
) -> Schedule:
    """Tasks of at most `run` query blocks, dealt to `workers` threads.

    A task begins at each of `heads`, for as many query heads as they are apart.
    """
    tasks = list(_tasks(lengths, heads, run))
    shares: list[list[Task]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for task in sorted(tasks, key=lambda task: _cost(task, window), reverse=True):
        least = loads.index(min(loads))
        shares[least].append(task)
        loads[least] += _cost(task, window)
    starts = [0]
    for share in shares:
        starts.append(starts[-1] + len(share))
    with torch.inference_mode(False):
        dealt = torch.tensor([task for share in shares for task in share], dtype=torch.int64)
        return Schedule(dealt, torch.tensor(starts), _blocks(max(lengths)))


def _tasks(lengths: Sequence[int], heads: range, run: int) -> Iterator[Task]:
    row = 0
    for length in lengths:
        blocks = _blocks(length)
        for head in heads:
            for first in range(0, blocks, run):
                yield Task(row, length, head, first, min(blocks, first + run))
        row += length


def _cost(task: Task, window: int) -> int:
    """Blocks of scores of one query head."""
    seen = _blocks(window) + 1
    return sum(min(block + 1, seen) for block in range(task.first, task.stop))


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
