import json
import statistics

import numpy as np
import pytest

from qtune.data.chunk import Hashes
from qtune.data.sample import Sample
from qtune.data.store import collected
from qtune.data.summary import MOST_BINS, figures, histogram, summary


def test_figures_of_samples():
    lengths = [3, 9, 4, 4, 20]
    samples = [Sample(f"x:{n}", [0] * n, [0.0] + [0.5] * (n - 1)) for n in lengths]
    found = summary(collected((sample, Hashes(1, 1)) for sample in samples))
    expected = {"samples": 5, "tokens": 40, "supervised_tokens": 35, "supervised_share": 0.875}
    expected |= {"length_min": 3, "length_max": 20}
    assert {key: found[key] for key in expected} == expected
    assert found["length_p50"] == statistics.median(lengths)
    assert 9 < found["length_p90"] < found["length_p99"] < 20
    assert json.loads(json.dumps(found)) == found


def test_figures_of_one_sample():
    found = figures(np.array([6]), np.array([0]))
    assert found["supervised_share"] == 0
    assert found["length_min"] == found["length_p50"] == found["length_p99"] == 6


@pytest.mark.parametrize(
    ("lengths", "width", "counts"),
    [
        ([1, 1, 2], 1, [0, 2, 1]),
        ([11], 1, [0] * 11 + [1]),
        ([12, 0], 2, [1, 0, 0, 0, 0, 0, 1]),
        ([100, 170, 181], 16, [0] * 6 + [1, 0, 0, 0, 1, 1]),
    ],
)
def test_histogram(lengths, width, counts):
    assert histogram(np.array(lengths)) == {"width": width, "counts": counts}


def test_histogram_has_few_bins_and_every_sample_in_one():
    for longest in (1, 7, 1000, 40_000):
        lengths = np.arange(longest + 1)
        found = histogram(lengths)
        assert len(found["counts"]) <= MOST_BINS and sum(found["counts"]) == len(lengths)
