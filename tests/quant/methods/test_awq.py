"""AWQ: channel factors that leave the layer's function as it is, and less error of its outputs."""

import pytest
import torch
from quant_layers import empty, hessian_of, output_error, weight_of
from torch import Tensor

from qtune.quant.clip import best
from qtune.quant.format import format_names
from qtune.quant.linear import QuantLinear
from qtune.quant.methods.awq import METHOD, POWERS, SHARED, best_channels
from qtune.recipe_quant import Quant

FORMATS = [name for name in format_names() if name not in ("e8p", "int8", "ternary")]
SETTINGS = Quant(method="awq")


def by_awq(weight: Tensor, hessian: Tensor, fmt: str = "int3") -> QuantLinear:
    layer = empty(weight, format=fmt, channels=True)
    layer.load(METHOD(layer, weight, hessian, SETTINGS, pytest.fail))
    return layer


def uneven(columns: int = 128) -> Tensor:
    """A Hessian of inputs of which a few carry almost everything."""
    sizes = torch.ones(columns)
    sizes[::16] = 12
    return hessian_of(columns) * sizes * sizes[:, None]


@pytest.mark.parametrize("fmt", FORMATS)
def test_outputs_lose_less_than_with_nearest_codes(fmt: str) -> None:
    weight, hessian = weight_of(), uneven()
    plain = empty(weight, format=fmt)
    plain.load(plain.pack(weight))
    found = output_error(by_awq(weight, hessian, fmt), weight, hessian)
    assert found < 0.8 * output_error(plain, weight, hessian)


def test_strong_inputs_are_made_weak() -> None:
    layer = by_awq(weight_of(), uneven())
    factors = layer.channel_factors
    assert factors is not None and factors.dtype == torch.float16
    strong = torch.zeros(128, dtype=torch.bool)
    strong[::16] = True
    assert factors[strong].float().mean() < 0.9 * factors[~strong].float().mean()


def test_power_is_the_best_of_all_that_are_tried() -> None:
    weight, hessian = weight_of(), uneven()
    layer = empty(weight, format="int3", channels=True)
    found = best_channels(layer, weight, hessian)
    sizes = hessian.diagonal().sqrt()

    def factors(power: float) -> Tensor:
        raised = sizes**power
        return (raised.max() * raised.min()).sqrt() / raised

    def lost(channels: Tensor) -> float:
        inner, inputs = weight / channels, hessian * channels * channels[:, None]
        params = best(layer.format, inner.view(-1, 64), inputs.diagonal().view(2, 64).repeat(24, 1))
        codes = layer.format.encode(inner.view(-1, 64), params)
        change = (layer.format.decode(codes, params).view(24, 128) - inner).double()
        return float(((change @ inputs.double()) * change).sum())

    powers = {power: factors(power) for power in POWERS}
    chosen = min(powers, key=lambda power: lost(powers[power]))
    assert chosen > 0
    torch.testing.assert_close(found, powers[chosen])


def test_inputs_alike_need_no_factors() -> None:
    layer = by_awq(weight_of(), torch.eye(128))
    assert layer.channel_factors is not None
    assert torch.equal(layer.channel_factors, torch.ones(128, dtype=torch.float16))


@pytest.mark.parametrize("group_size", [32, 64, "row", "tensor"])
def test_any_group_size(group_size: object) -> None:
    weight, hessian = weight_of(25, 80), uneven(80)
    layer = empty(weight, format="int4", channels=True, group_size=group_size)
    layer.load(METHOD(layer, weight, hessian, SETTINGS, pytest.fail))
    assert output_error(layer, weight, hessian) < 0.05


def test_factors_stay_within_half_precision() -> None:
    weight, hessian = weight_of(), hessian_of()
    hessian[0] *= 1e9
    hessian[:, 0] *= 1e9
    layer = by_awq(weight, hessian)
    assert layer.channel_factors is not None
    assert torch.isfinite(layer.channel_factors).all() and (layer.channel_factors > 0).all()
    assert torch.isfinite(layer.dequantize(torch.float32)).all()


def test_needs_a_hessian() -> None:
    weight = weight_of()
    with pytest.raises(ValueError, match="Hessian"):
        METHOD(empty(weight, channels=True), weight, None, SETTINGS, pytest.fail)


def test_without_factors_ranges_suit_the_inputs() -> None:
    weight, hessian = weight_of(), uneven()
    layer, plain = empty(weight, format="int2"), empty(weight, format="int2")
    layer.load(METHOD(layer, weight, hessian, SETTINGS, pytest.fail))
    plain.load(plain.pack(weight))
    error = output_error(plain, weight, hessian)
    assert output_error(layer, weight, hessian) < 0.98 * error


def test_shared_factors_are_those_of_all_layers_together() -> None:
    hessian = uneven()
    weights = [weight_of(rows, seed=rows) for rows in (8, 24)]
    layers = [empty(weight, format="int3", channels=True) for weight in weights]
    found = SHARED(layers, weights, hessian, SETTINGS)
    both = torch.cat(weights)
    expected = METHOD(empty(both, format="int3", channels=True), both, hessian, SETTINGS, print)
    assert torch.equal(found.half().view(torch.uint8), expected["channels"])
    for layer, weight in zip(layers, weights, strict=True):
        layer.load(METHOD(layer, weight, hessian, SETTINGS, pytest.fail, channels=found))
        assert torch.equal(layer.channel_factors, found.half())
        alone = output_error(by_awq(weight, hessian), weight, hessian)
        assert alone <= output_error(layer, weight, hessian) < 1.5 * alone


def test_no_factors_are_shared_with_a_layer_that_has_none() -> None:
    weight = weight_of()
    layers = [empty(weight, channels=True), empty(weight)]
    assert SHARED(layers, [weight, weight], uneven(), SETTINGS) is None
