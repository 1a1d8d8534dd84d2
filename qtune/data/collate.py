"""Samples to one batch without padding: they lie end to end in a single row of T tokens.

No token is spent on padding between samples, so lengths may differ. Positions restart at 0 with
each sample, and the attention (`model/attention.py`) keeps samples apart by their lengths. There is
no attention mask: transformers would take one as a sign that the row is a single text. A preference
row is two samples, one behind the other.

In training the row is filled up to a multiple of 128, by one more sample that nothing is learned
from. So few different row lengths occur: matrix libraries prepare and keep code for every shape
they meet, which for ever new lengths costs time, and tens of megabytes a step on the CPU.

Without packing the batch holds the same flat row, and `model/forward.py` makes one padded row of
each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtune.data.sample import Sample

# tokens; what `collate` should fill rows up to in training
ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Batch:
    """S samples in one row of T tokens, with N targets; what fills the row up counts as a sample.

    The logits at flat position `predicts[n]` are to give the token `targets[n]`, which counts
    `weights[n]` times and belongs to sample `sample_of[n]`. What was one row of the data is
    `num_parts` samples here, 2 for a preference row; places and labels are those of rows.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    targets: Tensor  # [N] int64
    predicts: Tensor  # [N] int64
    lengths: list[int]
    places: list[str]
    weights: Tensor | None  # [N] float32; None: all are 1
    sample_of: Tensor  # [N] int64, indices of `lengths`; on the CPU, to be counted without waiting
    num_parts: list[int]
    labels: list[bool | None]
    packing: bool = True


def collate(
    samples: Sequence[Sample],
    device: torch.device | str = "cpu",
    *,
    multiple: int = 1,
    packing: bool = True,
) -> Batch:
    """The rows as one Batch on the device, in the order given, the parts of each side by side.

    With packing, T is a multiple of `multiple`.
    """
    parts = [part for sample in samples for part in sample.parts]
    lengths = [len(part.ids) for part in parts]
    ids = _joined([part.ids for part in parts], np.int64)
    weights = _joined([part.weights for part in parts], np.float32)
    starts = list(accumulate(lengths, initial=0))
    # the first token of a sample is predicted by nothing of its own
    weights[[start for start, n in zip(starts, lengths, strict=False) if n]] = 0
    at = np.flatnonzero(weights)
    filling = -len(ids) % multiple if packing else 0

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device)

    whole = [*lengths, filling] if filling else lengths
    learned = weights[at]
    return Batch(
        input_ids=tensor(np.pad(ids, (0, filling)))[None],
        position_ids=tensor(_joined([range(length) for length in whole], np.int64))[None],
        targets=tensor(ids[at]),
        predicts=tensor(at - 1),
        lengths=whole,
        places=[sample.place for sample in samples],
        weights=None if (learned == 1).all() else tensor(learned),
        sample_of=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[at]),
        num_parts=[len(sample.parts) for sample in samples],
        labels=[sample.label for sample in samples],
        packing=packing,
    )


def _joined(values: Sequence[Sequence[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    """All of them, one behind the other, in memory of their own."""
    return np.concatenate([np.asarray(part, dtype) for part in values] or [np.empty(0, dtype)])
