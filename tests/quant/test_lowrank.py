"""Starts of adapters against full decompositions, gradient descent and PEFT's own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from quant_layers import empty, hessian_of, output_error, weight_of
from torch import Tensor, nn

from qtune.quant.linear import QuantLinear
from qtune.quant.lowrank import LOFTQ_TURNS, closest, start

RANK = 4


def quantized(weight: Tensor, **storage: Any) -> QuantLinear:
    layer = empty(weight, **storage)
    layer.load(layer.pack(weight))
    return layer


def lost(layer: QuantLinear, weight: Tensor, product: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) in float64 of a layer with a product added."""
    change = layer.dequantize(torch.float32).double() + product.double() - weight.double()
    return float(((change @ hessian.double()) * change).sum())


def regular(hessian: Tensor) -> Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


# wide and tall weights are decomposed from different sides
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_cloq_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight, hessian = weight_of(*shape), hessian_of(shape[1])
    layer = quantized(weight, format="int2", group_size="row")
    changed, a, b = start("cloq", weight, layer, hessian, RANK)
    assert changed is None
    assert a.shape == (RANK, shape[1]) and b.shape == (shape[0], RANK)
    assert a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()
    lower = torch.linalg.cholesky(regular(hessian).double())
    error = weight.double() - layer.dequantize(torch.float32).double()
    u, s, v = torch.linalg.svd(error @ lower, full_matrices=False)
    expected = (u[:, :RANK] * s[:RANK]) @ v[:RANK] @ torch.linalg.inv(lower)
    torch.testing.assert_close((b @ a).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
@pytest.mark.parametrize("storage", [{"format": "nf4"}, {"format": "int2", "rotated": True}])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], storage: dict[str, Any]) -> None:
    weight, hessian = weight_of(*shape), hessian_of(shape[1], tokens=10)
    layer = quantized(weight, **storage)
    _, a, b = start("cloq", weight, layer, hessian, 24)
    torch.testing.assert_close(
        layer.dequantize(torch.float32) + b @ a, weight, rtol=1e-5, atol=1e-5
    )


def test_gradient_descent_finds_nothing_better_than_cloq() -> None:
    weight, hessian = weight_of(24, 64), regular(hessian_of(64))
    layer = quantized(weight, format="int3")
    _, a, b = start("cloq", weight, layer, hessian, RANK, damping=1e-9)
    found = lost(layer, weight, b @ a, hessian)
    error = (weight - layer.dequantize(torch.float32)).double()
    generator = torch.Generator().manual_seed(2)
    trained = [
        (0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in ((RANK, 64), (24, RANK))
    ]
    optimizer = torch.optim.LBFGS(trained, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        change = error - trained[1] @ trained[0]
        value = ((change @ hessian.double()) * change).sum()
        value.backward()
        return value

    best = float(optimizer.step(loss).detach())
    best = float(loss().detach())
    assert found <= best * (1 + 1e-6)
    assert found == pytest.approx(best, rel=0.01)


def test_cloq_beats_the_nearest_product_on_outputs() -> None:
    weight, hessian = weight_of(), hessian_of()
    layer = quantized(weight, format="nf4")
    error = weight - layer.dequantize(torch.float32)
    _, a, b = start("cloq", weight, layer, hessian, RANK)
    near_a, near_b = closest(error, RANK)
    none = lost(layer, weight, torch.zeros(1), hessian)
    assert lost(layer, weight, b @ a, hessian) < 0.8 * lost(layer, weight, near_b @ near_a, hessian)
    assert lost(layer, weight, near_b @ near_a, hessian) < none
    assert output_error(layer, weight, hessian) > 0


def test_dead_inputs_and_indefinite_hessians_are_noted() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(64)
    hessian[0] = hessian[:, 0] = 0
    notes: list[str] = []
    layer = quantized(weight)
    _, a, b = start("cloq", weight, layer, hessian, RANK, note=notes.append)
    assert len(notes) == 1 and torch.isfinite(a).all() and torch.isfinite(b).all()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_closest_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    matrix = weight_of(*shape)
    a, b = closest(matrix, RANK)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    torch.testing.assert_close((b @ a).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), s[:RANK].sqrt().float())
    torch.testing.assert_close(b.norm(dim=0), s[:RANK].sqrt().float())


def test_nothing_to_make_up_for() -> None:
    a, b = closest(torch.zeros(8, 16), RANK)
    assert torch.equal(b @ a, torch.zeros(8, 16))
    assert torch.isfinite(a).all() and torch.isfinite(b).all()


def test_loftq_is_that_of_peft() -> None:
    """The loop of peft.utils.loftq_utils.loftq_init, with this layer's codes instead of its own."""
    weight = weight_of(32, 64)
    layer = quantized(weight, format="nf4")
    product = torch.zeros_like(weight)
    for _ in range(LOFTQ_TURNS):
        codes = quantized(weight - product, format="nf4").dequantize(torch.float32)
        found = _low_rank_decomposition(weight - codes, reduced_rank=RANK)
        product = found["L"] @ found["R"]
    changed, a, b = start("loftq", weight, layer, None, RANK)
    assert changed is not None
    torch.testing.assert_close(b @ a, product, rtol=1e-3, atol=1e-4)
    again = empty(weight, format="nf4")
    again.load(changed)
    torch.testing.assert_close(again.dequantize(torch.float32), codes)
    assert torch.equal(layer.weight, again.weight)
    plain = quantized(weight, format="nf4").dequantize(torch.float32)
    assert (again.dequantize(torch.float32) + b @ a - weight).norm() < (plain - weight).norm()


def test_pissa_is_that_of_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    weight = model[0].weight.detach().clone()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="pissa")
    adapted: Any = get_peft_model(model, config).base_model.model[0]
    layer = quantized(weight, format="int8")
    changed, a, b = start("pissa", weight, layer, None, RANK)
    assert changed is not None
    expected = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    torch.testing.assert_close(b @ a, expected.detach(), rtol=1e-4, atol=1e-5)
    # the vectors are the same but for their signs
    own = adapted.lora_A["default"].weight.detach()
    torch.testing.assert_close(a.abs(), own.abs(), rtol=1e-3, atol=1e-4)
    rest = layer.dequantize(torch.float32)
    torch.testing.assert_close(rest, adapted.base_layer.weight.detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_codes_come_from_whoever_is_asked(init: Any) -> None:
    weight = weight_of(16, 64)
    layer = quantized(weight, format="int4", channels=True)
    asked: list[Tensor] = []

    def encode(dense: Tensor) -> dict[str, Tensor]:
        asked.append(dense)
        return layer.pack(dense, torch.full((64,), 2.0))

    changed, _, _ = start(init, weight, layer, None, RANK, encode=encode)
    assert changed is not None and layer.channel_factors is not None
    assert torch.equal(layer.channel_factors, torch.full((64,), 2.0).half())
    assert len(asked) == (LOFTQ_TURNS if init == "loftq" else 1)


def test_channel_factors_of_the_layer_stay() -> None:
    weight = weight_of(16, 64)
    layer = empty(weight, format="int4", channels=True)
    factors = torch.linspace(0.5, 2, 64)
    layer.load(layer.pack(weight, factors))
    start("loftq", weight, layer, None, RANK)
    assert layer.channel_factors is not None
    assert torch.equal(layer.channel_factors, factors.half())


def test_rank_is_at_most_what_the_weight_has() -> None:
    weight = weight_of(3, 64)
    _, a, b = start("cloq", weight, quantized(weight), hessian_of(64), 16)
    assert a.shape == (3, 64) and b.shape == (3, 3)


def test_cloq_needs_a_hessian() -> None:
    weight = weight_of(8, 64)
    with pytest.raises(ValueError, match="Hessian"):
        start("cloq", weight, quantized(weight), None, RANK)
