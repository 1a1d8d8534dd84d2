import pytest

from qtune.data.chunk import NO_ROW
from qtune.data.feed import StoredFeed
from qtune.data.mix import Mix
from qtune.data.order import micro_batches, share
from qtune.data.sample import Sample
from qtune.data.store import collected
from qtune.workload import workload


class Stream:
    """A feed of which only the first samples are known; reading it is not for a plan."""

    num_rows = None

    def __init__(self, *lengths):
        self.samples = samples(*lengths)


def samples(*lengths):
    return [Sample(f"x:{i}", [0] * n, [1.0] * n) for i, n in enumerate(lengths)]


def feed(*lengths, batch_size=4):
    part = collected((sample, NO_ROW) for sample in samples(*lengths))
    return StoredFeed(Mix([part], [None]), batch_size, 0)


LENGTHS = [5, 90, 31, 64, 33, 18, 77, 40, 12, 55, 60, 21]


def size(group, packing):
    lengths = [len(part.ids) for sample in group for part in sample.parts]
    return sum(lengths) if packing else len(lengths) * -(-max(lengths) // 8) * 8


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_largest_micro_batch_is_one_that_the_run_meets(tiny_recipe, num_processes, packing):
    recipe, given = tiny_recipe(train={"batch_size": 5}), feed(*LENGTHS, batch_size=5)
    found = workload(recipe, given, 9, num_processes, packing=packing).largest(150)
    sizes = [
        size(group, packing)
        for step in range(9)
        for group in micro_batches(share(given.batch(step), 0, num_processes), 150, packing=packing)
    ]
    assert size(found, packing) == max(sizes)


def test_the_longest_sample_of_all_is_counted_if_no_step_looked_at_has_it(tiny_recipe):
    given = feed(*LENGTHS, 500, batch_size=4)
    step = next(s for s in range(9) if 500 not in [x.num_tokens for x in given.batch(s)])
    assert step == 0, "the seed has to be one whose first step is without it"
    load = workload(tiny_recipe(), given, 1, 1, packing=True)
    assert [sample.num_tokens for sample in load.largest(100)] == [500]
    assert load.longest.num_tokens == 500


def test_tokens_of_a_step_are_those_of_its_samples(tiny_recipe):
    given = feed(*LENGTHS)
    load = workload(tiny_recipe(), given, 3, 2, packing=True)
    assert load.tokens_per_step == sum(LENGTHS) // 3


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    # of 100 tokens at most, four samples in a step
    [(100, [100]), (64, [64]), (250, [83, 83, 83]), (300, [100] * 3), (1000, [100] * 4)],
)
def test_a_stream_is_planned_for_full_micro_batches(tiny_recipe, max_tokens, expected):
    recipe = tiny_recipe(data={"max_length": 100})
    load = workload(recipe, Stream(20, 40), 9, 1, packing=True)
    found = load.largest(max_tokens)
    assert [sample.num_tokens for sample in found] == expected
    assert all(sample.num_targets == len(sample.ids) - 1 for sample in found)
    assert load.tokens_per_step == 30 * 4
    shared = workload(recipe, Stream(20), 9, 2, packing=True).largest(1000)
    assert [sample.num_tokens for sample in shared] == [100] * 2


def test_a_stream_of_pairs(tiny_recipe):
    recipe = tiny_recipe(data={"max_length": 100}, train={"objective": "dpo"})
    found = workload(recipe, Stream(20), 9, 1, packing=True).largest(400)
    assert [[len(part.ids) for part in sample.parts] for sample in found] == [[100, 100]] * 2
