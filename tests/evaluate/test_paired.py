import math

import numpy as np
import pytest

from qtune.evaluate.paired import difference
from qtune.evaluate.perplexity import SampleLoss


def drawn(num=40, seed=0):
    """Losses of two models: samples differ by much, the models by about 0.1 nat per token."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 400, num)
    level, change = draw.normal(3, 1, num), draw.normal(0.1, 0.05, num)
    one = [SampleLoss(n * (x + d), n) for n, x, d in zip(tokens, level, change, strict=True)]
    other = [SampleLoss(n * x, n) for n, x in zip(tokens, level, strict=True)]
    return one, other


def test_it_is_the_difference_of_the_mean_losses():
    one, other = drawn()
    total = sum(s.weight for s in one)
    expected = sum(s.loss for s in one) / total - sum(s.loss for s in other) / total
    found = difference(one, other)
    assert found.nats == pytest.approx(expected)
    assert found.num_samples == 40


def test_samples_of_one_length_have_the_error_of_a_mean():
    one = [SampleLoss(10 * x, 10) for x in (1.0, 2.0, 4.0, 8.5)]
    other = [SampleLoss(10 * x, 10) for x in (0.5, 1.75, 4.25, 8.0)]
    changes = np.array([0.5, 0.25, -0.25, 0.5])
    found = difference(one, other)
    assert found.nats == pytest.approx(changes.mean())
    assert found.standard_error == pytest.approx(changes.std(ddof=1) / 2)


def test_the_error_is_what_other_samples_would_have_given():
    means = [difference(*drawn(seed=seed)) for seed in range(400)]
    spread = np.std([found.nats for found in means], ddof=1)
    assert np.mean([found.standard_error for found in means]) == pytest.approx(spread, rel=0.1)
    # unpaired, the difference would drown
    one, _ = drawn()
    losses = [s.loss / s.weight for s in one]
    assert means[0].standard_error < np.std(losses) / math.sqrt(len(losses)) / 5


def test_one_sample_has_no_error():
    found = difference([SampleLoss(6.0, 3)], [SampleLoss(3.0, 3)])
    assert found.nats == 1.0 and math.isnan(found.standard_error)


@pytest.mark.parametrize("other", [[], [SampleLoss(1.0, 4)], [SampleLoss(1.0, 3)] * 2])
def test_other_samples_are_refused(other):
    with pytest.raises(ValueError, match="the same samples"):
        difference([SampleLoss(1.0, 3)], other)
    with pytest.raises(ValueError, match="the same samples"):
        difference(other, other[:-1] if other else [])
