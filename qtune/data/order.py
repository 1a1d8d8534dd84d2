"""Which rows come when, and which lie in one forward pass together, as pure functions.

Nothing here has a state or draws from a shared random generator, so a resumed run needs no saved
position of an iterator, and every process can work out what the others do.

A step's samples are packed best-fit decreasing: the longest first, each into the fullest bin that
still has room for it, which takes at most 11/9 of the fewest bins possible (plus one). Where rows
have to be padded, samples of similar length go together and padding counts as tokens. Neither
changes the loss: it is summed over all bins of all processes and divided once.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qtune.data.sample import Sample

# padded rows are as long as the longest of them, rounded up: matrix kernels like round lengths
PADDING_MULTIPLE = 8


@lru_cache(maxsize=4)
def order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(num_rows), int64, that depends on nothing but the arguments."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(num_rows, generator=generator)


def share(samples: Sequence[Sample], process: int, num_processes: int) -> list[Sample]:
    """What one process takes of a step: every n-th by length, so that all have as much to do."""
    return sorted(samples, key=lambda sample: -sample.num_tokens)[process::num_processes]


def micro_batches(
    samples: Sequence[Sample], max_tokens: int, *, packing: bool = True
) -> list[list[Sample]]:
    """The samples of a step in groups of at most `max_tokens`, the longest sample in the first.

    So a step that does not fit into memory fails at once. A sample longer than `max_tokens` forms
    its own group; both parts of a preference row stay together. Without packing a group counts as
    many tokens as its rows have when padded to the longest.
    """
    longest_first = sorted(samples, key=lambda sample: -_size(sample, packing))
    return (_best_fit if packing else _alike)(longest_first, max_tokens)


def padded_length(length: int) -> int:
    """The length of a padded row whose longest sample has `length` tokens."""
    return length + -length % PADDING_MULTIPLE


def _size(sample: Sample, packing: bool) -> int:
    return sample.num_tokens if packing else max(len(part.ids) for part in sample.parts)


def _best_fit(longest_first: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Bins of samples; each sample goes where it leaves the least room."""
    bins: list[list[Sample]] = []
    # (tokens left, number of the bin), ascending
    rooms: list[tuple[int, int]] = []
    for sample in longest_first:
        at = bisect_left(rooms, (sample.num_tokens, 0))
        if at == len(rooms):
            rooms.append((max_tokens, len(bins)))
            bins.append([])
        room, number = rooms.pop(at)
        bins[number].append(sample)
        insort(rooms, (room - sample.num_tokens, number))
    return bins


def _alike(longest_first: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Groups of similar length, filled one after the other with rows as long as their first."""
    groups: list[list[Sample]] = []
    width = room = 0
    for sample in longest_first:
        if not groups or width * len(sample.parts) > room:
            groups.append([])
            width, room = padded_length(_size(sample, packing=False)), max_tokens
        groups[-1].append(sample)
        room -= width * len(sample.parts)
    return groups


def _mixed(seed: int, epoch: int) -> int:
    """One 63-bit seed; a plain sum would give seed 1 the orders of seed 0, one epoch later."""
    return (seed * 0x9E3779B97F4A7C15 + epoch) % 2**63
