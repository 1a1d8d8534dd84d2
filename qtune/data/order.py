"""Which rows come when, as pure functions: a resumed run needs no saved position of an iterator."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from qtune.data.chat import Sample


@lru_cache(maxsize=2)
def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(num_rows) that depends on nothing but the arguments."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(num_rows, generator=generator).tolist()


def rows_of_step(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step`, counted from 0; epochs follow without a gap."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [order(num_rows, seed, at // num_rows)[at % num_rows] for at in places]


def share(samples: Sequence[Sample], process: int, num_processes: int) -> list[Sample]:
    """What one process takes of a step: every n-th by length, so that all have as much to do."""
    return sorted(samples, key=lambda sample: -len(sample.ids))[process::num_processes]


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """The samples of a step in groups of at most `max_tokens`, similar lengths together.

    A sample longer than that forms its own group. Longest first, so that a batch that does not fit
    into memory fails at once.
    """
    groups: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        if not groups or len(sample.ids) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(sample)
        room -= len(sample.ids)
    return groups


def _mixed(seed: int, epoch: int) -> int:
    """One 63-bit seed; a plain sum would give seed 1 the orders of seed 0, one epoch later."""
    return (seed * 0x9E3779B97F4A7C15 + epoch) % 2**63
