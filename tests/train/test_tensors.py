from types import SimpleNamespace

import torch
from torch import nn

from qtune.train.tensors import (
    put_parameters,
    put_random_numbers,
    random_numbers,
    trained_parameters,
    whole_parameters,
)

CPU = torch.device("cpu")


def processes(number, index=0):
    """Processes whose generators are all in the state of this one."""
    return SimpleNamespace(
        device=CPU,
        num_processes=number,
        process_index=index,
        gather=lambda own: own.repeat(number, 1),
    )


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].requires_grad_(False)
    return model


def test_only_what_is_trained_is_kept_and_later_steps_do_not_change_it():
    model = net()
    kept = whole_parameters(model)
    assert kept.keys() == trained_parameters(model).keys() == {"1.weight", "1.bias"}
    with torch.no_grad():
        model[1].weight.fill_(7)
    assert torch.equal(kept["1.weight"], torch.ones(3))
    put_parameters(model, kept)
    assert torch.equal(model[1].weight, torch.ones(3))
    assert model[1].weight.requires_grad


def test_random_numbers_go_on_where_they_were():
    torch.manual_seed(5)
    saved = random_numbers(processes(2))
    expected = torch.rand(4)
    assert saved.keys() == {"rank_0", "rank_1"}
    torch.manual_seed(99)
    put_random_numbers(saved, processes(2, 1), 0)
    assert torch.equal(torch.rand(4), expected)


def test_each_process_gets_its_own_random_numbers():
    states = {}
    for i, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        states |= {f"rank_{i}": torch.get_rng_state()}
    put_random_numbers(states, processes(2, 1), 0)
    found = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(found, torch.rand(3))


def test_another_number_of_processes_draws_anew():
    saved = random_numbers(processes(1))
    drawn = []
    for index in (0, 1):
        put_random_numbers(saved, processes(2, index), 100)
        drawn.append(torch.rand(3))
    torch.manual_seed(101)
    assert torch.equal(drawn[1], torch.rand(3)) and not torch.equal(*drawn)
