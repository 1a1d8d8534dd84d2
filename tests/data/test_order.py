import random

import pytest
import torch

from qtune.data.order import PADDING_MULTIPLE, micro_batches, order, padded_length, share
from qtune.data.sample import Sample


def sample(length, rejected=None):
    return Sample("x", [0] * length, [1.0] * length, rejected=rejected and sample(rejected))


def samples(*lengths):
    return [sample(length) for length in lengths]


def lengths_of(groups):
    return [[sample.num_tokens for sample in group] for group in groups]


def same(first, second):
    return sorted(map(id, first)) == sorted(map(id, second))


@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000])
def test_order_is_a_permutation(num_rows):
    assert sorted(order(num_rows, 0, 0).tolist()) == list(range(num_rows))


def test_order_is_a_function_of_its_arguments():
    first = order(50, 1, 2)
    torch.manual_seed(0)
    torch.rand(10)
    order.cache_clear()
    assert torch.equal(order(50, 1, 2), first)
    found = {tuple(order(50, s, e).tolist()) for s in range(5) for e in range(5)}
    assert len(found) == 25


def test_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order(51, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_every_sample_once_and_keep_the_limit(seed, packing):
    draw = random.Random(seed)
    given = [
        sample(draw.randint(1, 60), draw.choice([None, draw.randint(1, 60)])) for _ in range(40)
    ]
    groups = micro_batches(given, 64, packing=packing)
    assert same([each for group in groups for each in group], given)
    for group in groups:
        parts = [len(part.ids) for each in group for part in each.parts]
        size = sum(parts) if packing else len(parts) * padded_length(max(parts))
        assert size <= 64 or len(group) == 1


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_against_one_that_looks_at_every_bin(seed):
    draw = random.Random(seed)
    given = samples(*(draw.randint(1, 40) for _ in range(60)))
    bins = []
    for length in sorted((each.num_tokens for each in given), reverse=True):
        fitting = [each for each in bins if sum(each) + length <= 64]
        if not fitting:
            bins.append(fitting := [])
            fitting.append(length)
        else:
            max(fitting, key=sum).append(length)
    found = lengths_of(micro_batches(given, 64))
    assert sorted(map(sum, found)) == sorted(map(sum, bins))
    fewest = -(-sum(each.num_tokens for each in given) // 64)
    assert len(found) <= 11 / 9 * fewest + 1


def test_gaps_are_filled():
    # in order of length alone there would be four: 60, 50, 50, 40 + 40 + 10
    assert lengths_of(micro_batches(samples(10, 60, 40, 50, 40, 50), 100)) == [
        [60, 40],
        [50, 50],
        [40, 10],
    ]


def test_the_longest_is_in_the_first_group():
    for packing in (True, False):
        groups = micro_batches(samples(3, 9, 30, 8), 32, packing=packing)
        assert groups[0][0].num_tokens == 30


def test_similar_lengths_share_a_padded_group():
    groups = lengths_of(micro_batches(samples(9, 50, 10, 48, 11), 112, packing=False))
    assert groups == [[50, 48], [11, 10, 9]]


def test_padding_counts_and_is_a_multiple():
    assert [padded_length(n) for n in (1, 8, 9)] == [8, 8, 16] and PADDING_MULTIPLE == 8
    assert lengths_of(micro_batches(samples(9, 1, 1), 32, packing=False)) == [[9, 1], [1]]
    assert lengths_of(micro_batches(samples(9, 1, 1), 11)) == [[9, 1, 1]]


def test_a_longer_sample_is_alone():
    assert lengths_of(micro_batches(samples(5, 99, 5), 40)) == [[99], [5, 5]]
    assert lengths_of(micro_batches(samples(5, 99, 5), 40, packing=False)) == [[99], [5, 5]]


def test_exact_fit_and_none():
    assert lengths_of(micro_batches(samples(20, 20, 20), 40)) == [[20, 20], [20]]
    assert micro_batches([], 40) == micro_batches([], 40, packing=False) == []


def test_both_answers_of_a_preference_row_count():
    pairs = [sample(20, 4), sample(10, 10), sample(4, 4)]
    assert lengths_of(micro_batches(pairs, 32)) == [[24, 8], [20]]
    # padded to the longer of the two: 2 x 24, 4 x 16
    assert lengths_of(micro_batches(pairs, 64, packing=False)) == [[24], [20, 8]]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_of_all_processes_are_the_step(num_processes):
    step = samples(5, 1, 9, 3, 7, 2, 8)
    shares = [share(step, process, num_processes) for process in range(num_processes)]
    assert same([each for own in shares for each in own], step)
    work = [sum(each.num_tokens for each in own) for own in shares]
    assert max(work) - min(work) <= 9
