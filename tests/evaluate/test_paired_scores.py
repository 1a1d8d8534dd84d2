import numpy as np
import pytest

from qtune.evaluate.paired_scores import DRAWS, p_value


@pytest.mark.parametrize(("only_one", "only_other", "both"), [(9, 2, 50), (5, 5, 1), (1, 0, 0)])
def test_right_and_wrong_are_mcnemars_exact_test(only_one, only_other, both):
    stats = pytest.importorskip("scipy.stats")
    one = [1] * only_one + [0] * only_other + [1] * both
    other = [0] * only_one + [1] * only_other + [1] * both
    expected = stats.binomtest(only_one, only_one + only_other, 0.5).pvalue
    assert p_value(one, other) == pytest.approx(expected)
    assert p_value(other, one) == pytest.approx(expected)


def test_a_textbook_value():
    # 2 * (1 + 10 + 45) / 2**10
    assert p_value([1] * 8 + [0] * 2, [0] * 8 + [1] * 2) == pytest.approx(112 / 1024)


def test_thousands_of_questions_are_no_overflow():
    assert p_value([1] * 3000 + [0] * 2000, [0] * 3000 + [1] * 2000) < 1e-40


def test_shares_are_a_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    one = draw.choice([0.0, 0.25, 0.5, 1.0], 40)
    other = np.clip(one - draw.choice([0, 0.5, -0.25], 40, p=[0.5, 0.2, 0.3]), 0, 1)

    def mean_difference(a, b, axis):
        return np.mean(a - b, axis=axis)

    expected = stats.permutation_test(
        (one, other),
        mean_difference,
        permutation_type="samples",
        n_resamples=DRAWS,
        rng=1,
    ).pvalue
    assert 0.05 < expected < 0.95
    assert p_value(one.tolist(), other.tolist()) == pytest.approx(expected, abs=0.015)


def test_it_is_never_0_by_lot():
    one = [0.75, 1.0] * 40
    assert p_value(one, [0.25] * 80) == pytest.approx(1 / (DRAWS + 1))


def test_under_chance_alone_it_is_small_as_rarely_as_it_says():
    draw = np.random.default_rng(3)
    found = [
        p_value(draw.choice([0, 0.5, 1], 60).tolist(), draw.choice([0, 0.5, 1], 60).tolist())
        for _ in range(200)
    ]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.1


def test_equal_answers_are_no_difference():
    assert p_value([1, 0, 0.5], [1, 0, 0.5]) == 1


@pytest.mark.parametrize("other", [[], [1.0]])
def test_other_questions_are_refused(other):
    with pytest.raises(ValueError, match="the same questions"):
        p_value([1.0, 0.0] if other else [], other)
