"""A share of the rows set aside, to measure a run on what it was not trained on.

Whole rows are drawn, so that pieces of one text stay on one side. The draw depends on the seed and
on the source alone: it stays the same when other sources join the mix.
"""

import random

import numpy as np

from qtune.data.chunk import BAD, Ints
from qtune.data.store import Samples
from qtune.errors import UserError


def divided(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """The rest and the share of a source's rows, both in their order.

    The share is at least one row, but not all of them, and none whose answer a label calls bad.
    """
    rows = np.cumsum(samples.whole != 0) - 1
    drawn = np.isin(rows, _drawn(rows, samples.labels, share, seed))
    return samples.select(np.flatnonzero(~drawn)), samples.select(np.flatnonzero(drawn))


def good_answers(held_out: Samples) -> Samples:
    """The samples without answers that a label calls bad: nobody wants those to be likely.

    Raises UserError where no other is left.
    """
    good = np.flatnonzero(held_out.labels != BAD)
    if not len(good):
        raise UserError(
            f"{held_out[0].place}: none of the held-out rows has a good answer; name others as "
            "data.validation"
        )
    return held_out if len(good) == len(held_out) else held_out.select(good)


def _drawn(rows: Ints, labels: Ints, share: float, seed: int) -> list[int]:
    """Numbers of the rows that are set aside; `rows` and `labels` are those of each sample."""
    good = np.unique(rows[labels != BAD]).tolist()
    num_rows = int(rows[-1]) + 1
    num = min(max(1, round(share * num_rows)), num_rows - 1, len(good))
    return random.Random(f"held out {seed}").sample(good, num)
