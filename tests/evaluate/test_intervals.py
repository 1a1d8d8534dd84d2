import numpy as np
import pytest

from qtune.evaluate.intervals import bootstrap_interval, interval, wilson_interval


@pytest.mark.parametrize(("correct", "num"), [(0, 10), (1, 7), (87, 100), (10, 10), (250, 300)])
def test_interval_ends_are_where_the_score_test_is_at_its_limit(correct: int, num: int) -> None:
    # the definition: shares p whose own standard error puts the observed share 1.96 errors away
    share = correct / num
    low, high = wilson_interval(correct, num)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for p in (low, high):
        error = (p * (1 - p) / num) ** 0.5
        assert abs(share - p) == pytest.approx(1.959964 * error, abs=1e-6)


def test_interval_of_a_published_example() -> None:
    # 81 of 263: Newcombe 1998, table I
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_it_is_the_interval_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for correct, num in [(0, 12), (3, 12), (93, 100), (500, 500)]:
        expected = stats.binomtest(correct, num).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct, num) == pytest.approx(tuple(expected))


def test_right_and_wrong_are_told_from_shares():
    assert interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)
    assert interval([0.5, 0.0, 1.0, 1.0]) == bootstrap_interval([0.5, 0.0, 1.0, 1.0])


def test_the_bootstrap_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).choice([0, 0.25, 0.5, 1], 200, p=[0.1, 0.2, 0.3, 0.4])
    done = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    assert bootstrap_interval(values) == pytest.approx(tuple(done.confidence_interval), abs=4e-3)


def test_values_that_are_all_the_same_are_sure():
    assert bootstrap_interval([0.5] * 30) == pytest.approx((0.5, 0.5))
