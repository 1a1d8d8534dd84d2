from collections import Counter

import numpy as np
import pytest
import torch

from qtune.data.mix import Mix
from qtune.data.order import order
from qtune.data.sample import Sample
from qtune.errors import UserError


class Part(list):
    """Samples of lengths 1, 2, 3 ..., as the store would hand them out."""

    def __init__(self, name, size):
        super().__init__(Sample(f"{name}:{i}", [i] * (i + 1), [1.0] * (i + 1)) for i in range(size))
        self.sha256 = f"{name} {size}"

    @property
    def lengths(self):
        return np.array([sample.num_tokens for sample in self])


def places(mix, seed, epoch):
    return [mix[i].place for i in mix.epoch(seed, epoch).tolist()]


def test_it_is_one_sequence():
    a, b = Part("a", 3), Part("b", 2)
    mix = Mix([a, b], [None, None])
    assert list(mix) == [*a, *b] and len(mix) == 5
    assert mix[-1] is b[1] and mix[1:4] == [a[1], a[2], b[0]]
    assert mix.lengths.tolist() == [1, 2, 3, 1, 2] and mix.lengths.dtype == torch.int64
    for index in (5, -6):
        with pytest.raises(IndexError):
            mix[index]


def test_without_weights_every_row_comes_once_an_epoch():
    mix = Mix([Part("a", 7), Part("b", 4)], [None, None])
    for epoch in range(3):
        assert torch.equal(mix.epoch(5, epoch), order(11, 5, epoch))


def test_weights_are_shares_of_an_epoch():
    mix = Mix([Part("a", 30), Part("b", 10)], [3.0, 1.0])
    assert Counter(p[0] for p in places(mix, 0, 0)) == {"a": 30, "b": 10}
    mix = Mix([Part("a", 30), Part("b", 10)], [1.0, 1.0])
    assert Counter(p[0] for p in places(mix, 0, 0)) == {"a": 20, "b": 20}
    # beside a weight, a source without one weighs what it has rows
    mix = Mix([Part("a", 30), Part("b", 10)], [None, 90.0])
    assert Counter(p[0] for p in places(mix, 0, 0)) == {"a": 10, "b": 30}


def test_no_row_comes_again_before_all_of_its_source_have_come():
    mix = Mix([Part("a", 7), Part("b", 5), Part("c", 11)], [1.0, 1.0, 1.0])
    taken = {"a": [], "b": [], "c": []}
    for epoch in range(12):
        for place in sorted(places(mix, 3, epoch)):
            taken[place[0]].append(place)
    for name, size in {"a": 7, "b": 5, "c": 11}.items():
        counts = Counter(taken[name])
        assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1


def test_an_epoch_goes_on_where_the_one_before_stopped():
    # 20 rows of one source at 4 an epoch: five epochs for all of them
    mix = Mix([Part("a", 20), Part("b", 4)], [1.0, 5.0])
    seen = [p for epoch in range(5) for p in places(mix, 0, epoch) if p[0] == "a"]
    assert sorted(seen) == sorted(f"a:{i}" for i in range(20))


def test_epochs_and_seeds_differ_and_are_repeatable():
    mix, again = (Mix([Part("a", 9), Part("b", 3)], [1.0, 1.0]) for _ in range(2))
    found = {(s, e): tuple(places(mix, s, e)) for s in range(3) for e in range(3)}
    assert len(set(found.values())) == 9
    assert all(tuple(places(again, *key)) == found[key] for key in found)


def test_the_order_within_an_epoch_mixes_the_sources():
    mix = Mix([Part("a", 50), Part("b", 50)], [1.0, 1.0])
    sources = "".join(place[0] for place in places(mix, 0, 0)[:20])
    assert "ab" in sources and "ba" in sources


def test_the_hash_is_of_samples_and_weights():
    a, b = Part("a", 3), Part("b", 2)
    given = [
        ([a, b], [None, None]),
        ([a, b], [1.0, None]),
        ([b, a], [None, None]),
        ([Part("a", 4), b], [None, None]),
    ]
    assert len({Mix(*each).sha256 for each in given}) == 4
    assert Mix(*given[0]).sha256 == Mix([Part("a", 3), Part("b", 2)], [None, None]).sha256


def test_a_weight_too_small_for_a_place_is_refused():
    with pytest.raises(UserError, match=r"source of b:0 gets none of the 12 places .* of 0.001"):
        Mix([Part("a", 10), Part("b", 2)], [1.0, 0.001])
