import numpy as np
import pytest

from qtune.data.feed import StoredFeed
from qtune.data.mix import Mix
from qtune.data.order import order
from qtune.data.sample import Sample


class Part(list):
    sha256 = "of the samples"

    @property
    def lengths(self):
        return np.array([sample.num_tokens for sample in self])


@pytest.fixture
def mix():
    return Mix([Part(Sample(f"x:{i}", [i], [0.0]) for i in range(5))], [None])


def test_steps_walk_through_every_epoch_without_a_gap(mix):
    feed = StoredFeed(mix, batch_size=3, seed=7)
    walked = [sample.ids[0] for step in range(9) for sample in feed.batch(step)]
    epochs = [walked[at : at + 5] for at in range(0, 25, 5)]
    assert epochs == [order(5, 7, epoch).tolist() for epoch in range(5)]


def test_a_batch_is_a_function_of_its_step(mix):
    feed = StoredFeed(mix, 3, 7)
    assert feed.batch(4) == feed.batch(4) == StoredFeed(mix, 3, 7).batch(4)
    assert feed.state() == {}
    feed.restore({})
    assert feed.batch(4) == StoredFeed(mix, 3, 7).batch(4)
    assert feed.batch(4) != StoredFeed(mix, 3, 8).batch(4)


def test_a_batch_may_be_larger_than_the_epoch(mix):
    batch = StoredFeed(mix, 12, 0).batch(0)
    assert sorted(sample.ids[0] for sample in batch[:10]) == sorted([0, 1, 2, 3, 4] * 2)
    assert len(batch) == 12


def test_what_it_says_of_itself(mix):
    feed = StoredFeed(mix, 2, 0)
    assert (feed.num_rows, feed.sha256) == (5, mix.sha256) and list(feed.samples) == list(mix)
