from types import SimpleNamespace

import pytest
import torch

from qtune.data.order import micro_batches, order, rows_of_step, share


def samples(*lengths):
    return [SimpleNamespace(ids=[0] * length) for length in lengths]


def lengths_of(groups):
    return [[len(sample.ids) for sample in group] for group in groups]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000])
def test_order_is_a_permutation(num_rows):
    assert sorted(order(num_rows, 0, 0)) == list(range(num_rows))


def test_order_is_a_function_of_its_arguments():
    first = order(50, 1, 2)
    torch.manual_seed(0)
    torch.rand(10)
    assert order(50, 1, 2) == first
    assert len({tuple(order(50, s, e)) for s in range(5) for e in range(5)}) == 25


def test_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order(50, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_hold_every_sample_once_and_keep_the_limit():
    given = samples(5, 30, 17, 8, 9, 22, 5, 1, 13)
    groups = micro_batches(given, 40)
    assert sorted(id(s) for group in groups for s in group) == sorted(id(s) for s in given)
    assert all(sum(lengths) <= 40 for lengths in lengths_of(groups))


def test_similar_lengths_share_a_group():
    groups = lengths_of(micro_batches(samples(9, 50, 10, 48, 11), 100))
    assert groups == [[50, 48], [11, 10, 9]]


def test_a_longer_sample_is_alone():
    assert lengths_of(micro_batches(samples(5, 99, 5), 40)) == [[99], [5, 5]]


def test_exact_fit_and_none():
    assert lengths_of(micro_batches(samples(20, 20, 20), 40)) == [[20, 20], [20]]
    assert micro_batches([], 40) == []


def test_steps_walk_through_every_pass_without_a_gap():
    walked = [row for step in range(9) for row in rows_of_step(5, 3, seed=7, step=step)]
    passes = [walked[at : at + 5] for at in range(0, 25, 5)]
    assert passes == [order(5, 7, epoch) for epoch in range(5)]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_of_all_processes_are_the_step(num_processes):
    step = samples(5, 1, 9, 3, 7, 2, 8)
    shares = [share(step, process, num_processes) for process in range(num_processes)]
    everything = [id(sample) for own in shares for sample in own]
    assert sorted(everything) == sorted(id(sample) for sample in step)
    work = [sum(len(sample.ids) for sample in own) for own in shares]
    assert max(work) - min(work) <= 9
