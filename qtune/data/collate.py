"""Samples to one batch without padding: they lie end to end in a single row of T tokens.

No token is spent on padding between samples, so lengths may differ. Positions restart at 0 with
each sample, and the attention (`model/attention.py`) keeps samples apart by their lengths. There is
no attention mask: transformers would take one as a sign that the row is a single text.

In training the row is filled up to a multiple of 128, by one more sample that nothing is learned
from. So few different row lengths occur: matrix libraries prepare and keep code for every shape
they meet, which for ever new lengths costs time, and tens of megabytes a step on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qtune.data.chat import Sample
from qtune.data.rows import Row

# tokens; what `collate` should fill rows up to in training
ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Batch:
    """S samples in one row of T tokens, with N targets; what fills the row up counts as a sample.

    The logits at flat position `predicts[n]` are to give the token `targets[n]`.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    targets: Tensor  # [N] int64
    predicts: Tensor  # [N] int64
    lengths: list[int]
    rows: list[Row]


def collate(
    samples: Sequence[Sample], device: torch.device | str = "cpu", *, multiple: int = 1
) -> Batch:
    """The samples as one Batch on the device, in the order given; T is a multiple of `multiple`."""
    lengths = [len(sample.ids) for sample in samples]
    starts = accumulate(lengths, initial=0)
    ids = [token for sample in samples for token in sample.ids]
    filling = -len(ids) % multiple
    if filling:
        ids += [0] * filling
        lengths.append(filling)
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
