"""Samples to one batch without padding: they lie end to end in a single row of T tokens.

No token is spent on padding, so lengths may differ. Positions restart at 0 with each sample, and
the attention (`model/attention.py`) keeps samples apart by their lengths. There is no attention
mask: transformers would take one as a sign that the row is a single text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qtune.data.chat import Sample
from qtune.data.rows import Row


@dataclass(frozen=True)
class Batch:
    """S samples in one row of T tokens, with N targets.

    The logits at flat position `predicts[n]` are to give the token `targets[n]`.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    targets: Tensor  # [N] int64
    predicts: Tensor  # [N] int64
    lengths: list[int]
    rows: list[Row]


def collate(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
    """The samples as one Batch on the device, in the order given."""
    lengths = [len(sample.ids) for sample in samples]
    starts = accumulate(lengths, initial=0)
    ids = [token for sample in samples for token in sample.ids]
    at = [
        start + i
        for start, sample in zip(starts, samples, strict=False)
        # The first token of a sample is predicted by nothing of its own.
        for i in range(1, len(sample.ids))
        if sample.supervised[i]
    ]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    return Batch(
        input_ids=tensor(ids)[None],
        position_ids=tensor([i for length in lengths for i in range(length)])[None],
        targets=tensor([ids[i] for i in at]),
        predicts=tensor([i - 1 for i in at]),
        lengths=lengths,
        rows=[sample.row for sample in samples],
    )
