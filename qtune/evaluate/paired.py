"""By how much one model's loss differs from another's on the same samples, with its error.

Samples differ far more from each other than two forms of one model do on each of them, so the
difference is taken sample by sample: its standard error is some ten times smaller than that of
either loss. Tokens of one sample are not independent of each other; samples are. So the error is
that of a ratio of sums over samples (linearised), not over tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qtune.evaluate.perplexity import SampleLoss


@dataclass(frozen=True)
class Difference:
    """A difference of mean losses per token in nats; its exponential is a ratio of perplexities.

    `standard_error` is NaN where there is only one sample.
    """

    nats: float
    standard_error: float
    num_samples: int


def difference(losses: Sequence[SampleLoss], reference: Sequence[SampleLoss]) -> Difference:
    """The mean loss less that of the reference on the same samples.

    Raises ValueError where the samples are not the same, or there is none.
    """
    weights = [sample.weight for sample in losses]
    if not weights or weights != [sample.weight for sample in reference]:
        raise ValueError(
            "two models are compared on the same samples, of which there is at least 1"
        )
    changes = [one.loss - other.loss for one, other in zip(losses, reference, strict=True)]
    total, num = math.fsum(weights), len(weights)
    mean = math.fsum(changes) / total
    rest = [change - mean * weight for change, weight in zip(changes, weights, strict=True)]
    spread = math.fsum(value * value for value in rest)
    error = math.sqrt(spread * num / (num - 1)) / total if num > 1 else math.nan
    return Difference(mean, error, num)
