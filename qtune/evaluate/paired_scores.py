"""Whether two models' answers to the same questions differ by more than chance.

Under the hypothesis that they do not, each question could as well have gone the other way round, so
the signs of the differences are drawn by lot. Where answers are right or wrong that is the exact
test of McNemar (1947): of the questions that only one model has right, either has half. Otherwise
the signs are drawn many times with a fixed seed; the observed ones count as one draw, so that the
p-value is never 0.
"""

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 20_000


def p_value(scores: Sequence[float], reference: Sequence[float]) -> float:
    """The two-sided p-value of the scores of two models on the same questions; 1 where none differ.

    Raises ValueError where there is not one score of each for every question.
    """
    if not scores or len(scores) != len(reference):
        raise ValueError("two models are compared on the same questions, at least 1")
    differences = np.subtract(scores, reference, dtype=float).round(9)
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) == 1:
        return _two_sided(int((differences > 0).sum()), int(counts[0]))
    wins = np.random.default_rng(0).binomial(counts, 0.5, (DRAWS, len(counts)))
    drawn = np.abs((2 * wins - counts) @ sizes)
    # rounding must not part sums that are equal
    as_far = int((drawn >= abs(differences.sum()) - 1e-9).sum())
    return (as_far + 1) / (DRAWS + 1)


def _two_sided(wins: int, num: int) -> float:
    """Chance that `num` fair coins part at least as unevenly as into `wins` and the rest."""
    fewer = min(wins, num - wins)
    # whole numbers: 2**-num is no float where there are thousands of questions
    tail = sum(math.comb(num, k) for k in range(fewer + 1))
    share: float = 2 * tail / 2**num
    return min(1.0, share)
