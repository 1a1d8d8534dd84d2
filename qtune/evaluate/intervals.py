"""How sure a mean over answers is: 95 % confidence intervals.

For right and wrong Wilson's score interval, which stays within [0, 1] and is right near the ends,
where tuned models score. For shares in between there is no formula that holds near the ends; the
interval is that of means of answers drawn again (percentile bootstrap), with a fixed seed.
"""

import math
from collections.abc import Sequence

import numpy as np

# two-sided 95 % of the normal distribution
Z = 1.959963984540054
DRAWS = 10_000


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of values in [0, 1], of which there is at least one."""
    if set(values) <= {0, 1}:
        return wilson_interval(round(sum(values)), len(values))
    return bootstrap_interval(values)


def wilson_interval(num_correct: int, num: int) -> tuple[float, float]:
    """Ends of the 95 % score interval (Wilson 1927) of a share of `num_correct` in `num` > 0."""
    share, spread = num_correct / num, Z * Z / num
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % percentile interval of the mean over values drawn again."""
    # how often each value is drawn, instead of which: the same draws in little memory
    found, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), DRAWS)
    low, high = np.quantile(drawn @ found / len(values), (0.025, 0.975))
    return float(low), float(high)
