"""Samples in figures: how many, how long, how much of them is learned."""

from typing import Any

import numpy as np

from qtune.data.chunk import Ints
from qtune.data.store import Samples

MOST_BINS = 12
PERCENTILES = (50, 90, 99)


def summary(samples: Samples) -> dict[str, Any]:
    """Samples, tokens, learned tokens, percentiles and a histogram of the lengths, for JSON."""
    return figures(samples.lengths, samples.num_targets)


def figures(lengths: Ints, num_targets: Ints) -> dict[str, Any]:
    """The figures of samples with these numbers of tokens and of learned tokens."""
    tokens, targets = int(lengths.sum()), int(num_targets.sum())
    found = {
        "samples": len(lengths),
        "tokens": tokens,
        "supervised_tokens": targets,
        "supervised_share": targets / tokens,
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
    }
    found |= {f"length_p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES}
    return {**found, "histogram": histogram(lengths)}


def histogram(lengths: Ints) -> dict[str, Any]:
    """How many lengths lie in each bin of `width` tokens, the first bin beginning at 0."""
    width = 1
    while lengths.max() >= MOST_BINS * width:
        width *= 2
    return {"width": width, "counts": np.bincount(lengths // width).tolist()}
