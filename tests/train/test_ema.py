"""The moving average against its sum in float64, and a model that gets every bit back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qtune.train.ema import Average
from qtune.train.parallel import whole

DECAY = 0.9


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, in which matrices can be sharded."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    distributed.destroy_process_group()


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {"a.weight": nn.Parameter(torch.ones(3, 2, dtype=dtype))}


def states(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=generator) for _ in range(num)]


@torch.no_grad()
def follow(average: Average, parameter: nn.Parameter, values: list[Tensor]) -> None:
    for value in values:
        parameter.copy_(value)
        average.update()


def expected(values: list[Tensor]) -> Tensor:
    shares = torch.tensor([DECAY ** (len(values) - i) for i in range(1, len(values) + 1)]).double()
    stacked = torch.stack(values).double()
    return (stacked * shares[:, None, None]).sum(0) / shares.sum()


@pytest.mark.parametrize("num", [1, 2, 30])
def test_is_the_weighted_mean_of_the_states_without_the_start(num: int) -> None:
    model = parameters()
    average = Average(model, DECAY)
    follow(average, model["a.weight"], states(num))
    found = average.tensors()["a.weight"].double()
    torch.testing.assert_close(found, expected(states(num)), rtol=0, atol=1e-6)


def test_is_the_start_before_the_first_step() -> None:
    average = Average(parameters(), DECAY)
    assert torch.equal(average.tensors()["a.weight"], torch.ones(3, 2))


def test_the_model_holds_it_for_a_while_and_then_its_own_bits() -> None:
    model = parameters()
    average = Average(model, DECAY)
    follow(average, model["a.weight"], states(5))
    with pytest.raises(KeyError), average.swapped():
        assert torch.equal(model["a.weight"], average.tensors()["a.weight"])
        raise KeyError
    assert torch.equal(model["a.weight"].detach(), states(5)[-1])
    torch.testing.assert_close(average.tensors()["a.weight"].double(), expected(states(5)))


def test_goes_on_bit_for_bit_from_a_file(tmp_path: Path) -> None:
    model, values = parameters(), states(8)
    average = Average(model, DECAY)
    follow(average, model["a.weight"], values[:3])
    save_file(average.tensors(), tmp_path / "average.safetensors")
    follow(average, model["a.weight"], values[3:])

    again = parameters()
    resumed = Average(again, DECAY)
    resumed.load(load_file(tmp_path / "average.safetensors"))
    follow(resumed, again["a.weight"], values[3:])
    assert all(torch.equal(t, resumed.tensors()[key]) for key, t in average.tensors().items())


def test_small_steps_of_a_16_bit_adapter_are_not_lost() -> None:
    model = parameters(torch.bfloat16)
    average = Average(model, 0.999)
    follow(average, model["a.weight"], [torch.ones(3, 2)] * 2 + [torch.full((3, 2), 1.0078125)])
    found = average.tensors()["a.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((3, 2), 1 + 0.0078125 / 3), rtol=0, atol=1e-5)
    with average.swapped():
        assert model["a.weight"].dtype == torch.bfloat16


def test_of_sharded_parameters_is_sharded(one_process: None) -> None:
    layer = nn.Linear(2, 3, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    average = Average(dict(layer.named_parameters()), DECAY)
    plain = {"weight": nn.Parameter(whole(layer.weight).clone())}
    beside = Average(plain, DECAY)
    for value in states(4):
        with torch.no_grad():
            layer.weight.to_local().copy_(value)
        average.update()
        follow(beside, plain["weight"], [value])
    assert isinstance(average.tensors()["weight"], DTensor)
    full = {name: whole(tensor) for name, tensor in average.tensors().items()}
    assert all(torch.equal(tensor, beside.tensors()[name]) for name, tensor in full.items())
    with average.swapped():
        assert torch.equal(whole(layer.weight), full["weight"])
    average.load({name: torch.zeros_like(tensor) for name, tensor in full.items()})
    assert float(whole(average.tensors()["weight"]).abs().max()) == 0
