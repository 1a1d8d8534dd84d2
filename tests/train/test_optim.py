"""Each optimizer by its recipe word: groups, a step, what it needs, and the bytes it keeps."""

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.errors import UserError
from qtune.model.scales import NAME, TrainedScales
from qtune.quant.linear import QuantLinear
from qtune.recipe import Train
from qtune.train import optim
from qtune.train.optim import check, make_optimizer, state_bytes

ON_CPU = ["adamw", "adamw_8bit", "adafactor", "lion", "muon"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings(**options: Any) -> Train:
    return Train(**{"steps": 1, "lr": 0.01, **options})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 80), nn.LayerNorm(80), nn.Linear(80, 3))


def with_adapter() -> peft.PeftModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model, peft.PeftModel)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
    x = torch.linspace(-1, 1, 5 * 80).view(5, 80)
    losses = []
    for _ in range(num):
        loss = (model(x) - torch.arange(3.0)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_parameter(optimizer: torch.optim.Optimizer, key: str) -> dict[int, float]:
    return {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ON_CPU)
def test_learns(name: str) -> None:
    model = net()
    losses = steps(model, make_optimizer(model, settings(optimizer=name)), 20)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ON_CPU)
def test_matrices_decay_vectors_do_not_and_the_frozen_are_left_out(name: str) -> None:
    model = net()
    model[2].requires_grad_(False)
    optimizer = make_optimizer(model, settings(optimizer=name, weight_decay=0.1))
    assert by_parameter(optimizer, "weight_decay") == {
        id(model[0].weight): 0.1,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }


@pytest.mark.parametrize("name", ON_CPU)
def test_a_group_moves_at_its_scale_of_the_rate(name: str) -> None:
    model = with_adapter()
    optimizer = make_optimizer(model, settings(optimizer=name, lora_plus_ratio=16.0))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["scale"]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {
        kind: max(
            float((p.detach() - before[key]).norm() / p.numel() ** 0.5)
            for key, p in model.named_parameters()
            if kind in key and p.shape in ((2, 16), (16, 2))
        )
        for kind in ("lora_A", "lora_B")
    }
    assert moved["lora_B"] / moved["lora_A"] == pytest.approx(16, rel=1e-3)


@pytest.mark.parametrize("name", ON_CPU)
def test_trained_scales_have_a_rate_of_their_own(name: str) -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 64))
    model = nn.ModuleDict({NAME: TrainedScales(layer, zeros=False)})
    model = nn.ModuleDict({"layer": model, "lora_A": nn.Linear(64, 4, bias=False)})
    optimizer = make_optimizer(model, settings(optimizer=name, weight_decay=0.1), 2e-5)
    rates = by_parameter(optimizer, "lr")
    scales = next(model["layer"].parameters())
    assert rates[id(scales)] == pytest.approx(2e-5)
    assert by_parameter(optimizer, "scale")[id(scales)] == pytest.approx(2e-3)
    assert by_parameter(optimizer, "weight_decay")[id(scales)] == 0
    assert rates[id(model["lora_A"].weight)] == 0.01
    same = make_optimizer(model, settings(optimizer=name))
    assert set(by_parameter(same, "scale").values()) == {1.0}


def test_lora_plus_has_the_rates_of_peft() -> None:
    model = with_adapter()
    ours = make_optimizer(model, settings(lora_plus_ratio=16.0, weight_decay=0.1))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    for key in ("lr", "weight_decay"):
        assert by_parameter(ours, key) == pytest.approx(by_parameter(theirs, key))
    assert set(by_parameter(ours, "scale").values()) == {1.0, 16.0}


def test_one_step_of_adamw() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = make_optimizer(model, settings(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9)))
    (model.weight * 3).sum().backward()
    optimizer.step()
    # decay by lr * 0.5, then a first step of lr whatever the gradient's size
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), 2.0 * 0.95 - 0.1))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_eight_bits_stay_close_to_adamw() -> None:
    full, packed = net(), net()
    steps(full, make_optimizer(full, settings()), 20)
    optimizer = make_optimizer(packed, settings(optimizer="adamw_8bit"))
    steps(packed, optimizer, 20)
    assert optimizer.state[packed[0].weight]["state1"].dtype == torch.uint8
    start, exact, rounded = (m[0].weight.detach() for m in (net(), full, packed))
    assert 0 < float((exact - rounded).norm() / (exact - start).norm()) < 0.05


def test_adafactor_follows_its_equations() -> None:
    """Algorithm 4 of the paper with its decay 1 - t^-0.8 and clipping at 1, in float64."""
    model = nn.Linear(6, 4, bias=False)
    expected = model.weight.detach().double()
    optimizer = make_optimizer(model, settings(optimizer="adafactor"))
    rows, columns = torch.zeros(4, 1).double(), torch.zeros(1, 6).double()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        gradient = torch.randn(4, 6, generator=generator)
        model.weight.grad = gradient.clone()
        optimizer.step()
        squares, decay = gradient.double() ** 2 + 1e-30, 1 - step**-0.8
        rows = decay * rows + (1 - decay) * squares.mean(1, keepdim=True)
        columns = decay * columns + (1 - decay) * squares.mean(0, keepdim=True)
        update = gradient.double() / (rows * columns / rows.mean()).sqrt()
        expected = expected - 0.01 * update / max(1, float(update.square().mean().sqrt()))
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=0, atol=1e-7)


def test_adafactor_moves_a_matrix_of_zeros() -> None:
    model = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = make_optimizer(model, settings(optimizer="adafactor"))
    model.weight.grad = torch.ones(4, 6)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((4, 6), -0.01))


@pytest.mark.parametrize(
    ("name", "instead"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")]
)
def test_paged_moments_need_a_gpu(name: str, instead: str) -> None:
    with pytest.raises(
        UserError, match=rf"train.optimizer: {name} .* no GPU here; write {instead}"
    ):
        check(settings(optimizer=name), CPU)
    check(settings(optimizer=name), CUDA)


def test_bitsandbytes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adamw_8bit needs .*pip install 'qtune\[bitsandbytes\]'"):
        check(settings(optimizer="adamw_8bit"), CUDA)
    for name in ("adamw", "adafactor", "lion", "muon"):
        check(settings(optimizer=name), CPU)


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit"])
def test_what_needs_whole_matrices_is_refused_where_they_are_sharded(name: str) -> None:
    with pytest.raises(UserError, match=r"train.parallel: fsdp shards; write adamw or lion"):
        check(settings(optimizer=name, parallel="fsdp"), CPU)
    check(settings(optimizer=name), CPU)
    check(settings(optimizer="lion", parallel="fsdp"), CPU)


@pytest.mark.parametrize("name", ON_CPU)
def test_bytes_are_those_of_the_state(name: str) -> None:
    model = net()
    optimizer = make_optimizer(model, settings(optimizer=name))
    steps(model, optimizer, 1)
    kept = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and not key.startswith("qmap")
    }
    with torch.device("meta"):
        shapes = net()
    assert state_bytes(shapes, settings(optimizer=name)) == sum(kept.values())


def test_bytes_of_paged_moments_and_of_the_average() -> None:
    model = nn.Sequential(nn.Linear(400, 300, bias=False), nn.Linear(10, 10, bias=False))
    assert state_bytes(model, settings(optimizer="paged_adamw")) == 2 * 4 * 100
    packed = state_bytes(model, settings(optimizer="paged_adamw_8bit"))
    assert packed == 2 * 4 * -(-120_000 // 256) + 2 * 4 * 100
    average = state_bytes(model, settings(ema_decay=0.9)) - state_bytes(model, settings())
    assert average == 4 * 120_100
