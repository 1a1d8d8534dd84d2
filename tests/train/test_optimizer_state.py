"""An optimizer that goes on from a checkpoint takes the very steps that it would have taken."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qtune.errors import UserError
from qtune.recipe import Train
from qtune.train.optim import make_optimizer
from qtune.train.optimizer_state import optimizer_tensors, restore_optimizer

ON_CPU = ["adamw", "adamw_8bit", "adafactor", "lion", "muon"]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, in which matrices can be sharded."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    distributed.destroy_process_group()


def settings(name: str) -> Train:
    return Train(steps=1, lr=0.01, weight_decay=0.1, optimizer=name)  # type: ignore[arg-type]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80), nn.LayerNorm(80))
    model[0].requires_grad_(False)
    return model


def sharded() -> nn.Sequential:
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
    losses = []
    for i in range(num):
        loss = (model(torch.full((4, 80), 0.1 * i + 1)) - torch.arange(80) / 80).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


@pytest.mark.parametrize("name", ON_CPU)
def test_goes_on_bit_for_bit_from_a_file(name: str, tmp_path: Path) -> None:
    model = net()
    optimizer = make_optimizer(model, settings(name))
    steps(model, optimizer, 3)
    save_file(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")
    start = whole(model)
    losses, end = steps(model, optimizer, 4), whole(model)

    resumed = net()
    resumed.load_state_dict(start)
    another = make_optimizer(resumed, settings(name))
    restore_optimizer(resumed, another, load_file(tmp_path / "optimizer.safetensors"))
    assert steps(resumed, another, 4) == losses
    assert all(torch.equal(end[key], value) for key, value in whole(resumed).items())


def test_without_the_state_it_does_not() -> None:
    model = net()
    optimizer = make_optimizer(model, settings("adamw"))
    steps(model, optimizer, 3)
    resumed = net()
    resumed.load_state_dict(whole(model))
    losses = steps(model, optimizer, 4)
    assert steps(resumed, make_optimizer(resumed, settings("adamw")), 4) != losses


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_saved_or_restored_is_a_copy(name: str) -> None:
    model = net()
    optimizer = make_optimizer(model, settings(name))
    steps(model, optimizer, 1)
    saved = optimizer_tensors(model, optimizer)
    before = {key: tensor.clone() for key, tensor in saved.items()}
    restore_optimizer(model, optimizer, saved)
    steps(model, optimizer, 1)
    assert all(torch.equal(before[key], tensor) for key, tensor in saved.items())


def test_before_the_first_step_there_is_only_its_name() -> None:
    model = net()
    optimizer = make_optimizer(model, settings("adamw"))
    saved = optimizer_tensors(model, optimizer)
    assert list(saved) == ["optimizer"]
    steps(model, optimizer, 1)
    restore_optimizer(model, optimizer, saved)
    assert list(optimizer_tensors(model, optimizer)) == ["optimizer"]


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = net()
    saved = optimizer_tensors(model, make_optimizer(model, settings("adamw")))
    with pytest.raises(UserError, match=r"written with AdamW, .* Lion cannot use; put train.opt"):
        restore_optimizer(model, make_optimizer(model, settings("lion")), saved)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_sharded_moments_are_saved_whole_and_come_back_sharded(
    name: str, one_process: None
) -> None:
    plain, split = net(), sharded()
    optimizers = [make_optimizer(model, settings(name)) for model in (plain, split)]
    assert steps(plain, optimizers[0], 3) == steps(split, optimizers[1], 3)
    saved = optimizer_tensors(split, optimizers[1])
    assert not any(isinstance(tensor, DTensor) for tensor in saved.values())
    expected = optimizer_tensors(plain, optimizers[0])
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)

    restore_optimizer(split, optimizers[1], saved)
    moment = optimizers[1].state[split[1].weight]["exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.placements == split[1].weight.placements
    assert steps(plain, optimizers[0], 3) == steps(split, optimizers[1], 3)


def test_paged_moments_come_back_into_the_optimizers_own_room() -> None:
    model = net()
    optimizer = make_optimizer(model, settings("adamw_8bit"))
    steps(model, optimizer, 1)
    saved = optimizer_tensors(model, optimizer)
    room: list[Tensor] = []

    def get_state_buffer(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        room.append(torch.zeros_like(parameter, dtype=dtype, requires_grad=False))
        return room[-1]

    # as bitsandbytes marks optimizers whose moments lie in memory that CUDA moves
    optimizer.is_paged = True  # type: ignore[attr-defined]
    optimizer.get_state_buffer = get_state_buffer  # type: ignore[attr-defined]
    restore_optimizer(model, optimizer, saved)
    state = optimizer.state[model[1].weight]
    assert state["state1"] is room[0] and state["state2"] is room[1]
    assert torch.equal(room[0], saved["1.weight::state1"])
