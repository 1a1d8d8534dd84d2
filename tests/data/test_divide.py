import pytest

from qtune.data.chunk import Hashes
from qtune.data.divide import divided, good_answers
from qtune.data.sample import Sample
from qtune.data.store import collected
from qtune.errors import UserError


def rows(count, pieces=1, label=lambda number: None):
    """Samples of rows, each of so many pieces; the first token is the number of the row."""
    return collected(
        (Sample(f"x:{i}", [i, k], [0.0, 1.0], label=label(i)), Hashes((k == 0) * (i + 1), 0))
        for i in range(count)
        for k in range(pieces)
    )


def numbers(samples):
    return [sample.ids[0] for sample in samples]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(40, 0.05, 2), (40, 0.001, 1), (40, 0.5, 20), (2, 0.9, 1), (1, 0.5, 0), (3, 0.5, 2)],
)
def test_the_share_has_so_many_rows(count, share, expected):
    rest, aside = divided(rows(count), share, seed=0)
    assert len(aside) == expected
    assert sorted(numbers(rest) + numbers(aside)) == list(range(count))
    assert numbers(rest) == sorted(numbers(rest)) and numbers(aside) == sorted(numbers(aside))


def test_the_draw_depends_on_the_seed():
    drawn = [numbers(divided(rows(100), 0.1, seed)[1]) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({tuple(some) for some in drawn}) == 3


def test_rows_are_drawn_evenly():
    counts = [0] * 10
    for seed in range(2000):
        for number in numbers(divided(rows(10), 0.2, seed)[1]):
            counts[number] += 1
    # 400 each, give or take 18 (one standard deviation)
    assert min(counts) > 310 and max(counts) < 490


def test_pieces_of_a_row_stay_together():
    rest, aside = divided(rows(20, pieces=3), 0.3, seed=0)
    assert len(aside) == 18 and not set(numbers(rest)) & set(numbers(aside))


def test_bad_answers_are_not_set_aside():
    some = rows(20, label=lambda number: number in (3, 7))
    rest, aside = divided(some, 0.5, seed=0)
    assert numbers(aside) == [3, 7] and len(rest) == 18
    assert len(divided(rows(20, label=lambda _: False), 0.5, seed=0)[1]) == 0


def test_only_good_answers_are_measured():
    assert numbers(good_answers(rows(6, label=lambda number: number % 2 == 0))) == [0, 2, 4]
    unlabelled = rows(3)
    assert good_answers(unlabelled) is unlabelled
    with pytest.raises(UserError, match="x:0: none of the held-out rows has a good answer"):
        good_answers(rows(3, label=lambda _: False))
