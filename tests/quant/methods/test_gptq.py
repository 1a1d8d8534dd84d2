"""GPTQ: less error of the outputs than the nearest codes, whatever the format and the groups."""

from typing import Any

import pytest
import torch
from quant_layers import empty, hessian_of, output_error, weight_of
from torch import Tensor

from qtune.quant.clip import best
from qtune.quant.format import format_names
from qtune.quant.grouped import params_at
from qtune.quant.linear import QuantLinear
from qtune.quant.methods.gptq import METHOD, column_order
from qtune.quant.weight import Settled
from qtune.recipe_quant import Calibration, Quant

FORMATS = [name for name in format_names() if name != "e8p"]
SETTINGS = Quant(method="gptq")


def by_gptq(weight: Tensor, hessian: Tensor, quant: Quant = SETTINGS, **storage: Any) -> Any:
    layer = empty(weight, **storage)
    layer.load(METHOD(layer, weight, hessian, quant, pytest.fail))
    return layer


def nearest(weight: Tensor, **storage: Any) -> QuantLinear:
    layer = empty(weight, **storage)
    layer.load(layer.pack(weight))
    return layer


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_outputs_lose_less_than_with_nearest_codes(fmt: str, rotated: bool) -> None:
    weight, hessian = weight_of(), hessian_of()
    found = output_error(by_gptq(weight, hessian, format=fmt, rotated=rotated), weight, hessian)
    plain = output_error(nearest(weight, format=fmt, rotated=rotated), weight, hessian)
    assert found < 0.9 * plain


# groups of 32 end within rows of 80, those of 256 span rows
@pytest.mark.parametrize("group_size", [16, 32, 128, 256, "row", "tensor"])
@pytest.mark.parametrize("width", [128, 80])
def test_any_group_size(group_size: Any, width: int) -> None:
    weight, hessian = weight_of(25, width), hessian_of(width)
    how = {"format": "int3", "group_size": group_size}
    found = output_error(by_gptq(weight, hessian, **how), weight, hessian)
    assert found < 0.9 * output_error(nearest(weight, **how), weight, hessian)


def test_rotated_layer() -> None:
    weight, hessian = weight_of(), hessian_of()
    layer = empty(weight, format="int3", rotated=True)
    plain = by_gptq(weight, hessian, format="int3")
    rotated = by_gptq(weight, hessian, format="int3", rotated=True)
    # its codes are those of the rotated problem
    inner, h = layer.inner_weight(weight), layer.inner_hessian(hessian)
    alone = by_gptq(inner, h, format="int3")
    assert torch.equal(rotated.weight, alone.weight)
    assert not torch.equal(rotated.weight, plain.weight)


@pytest.mark.parametrize("group_size", [32, "row", 64])
def test_codes_are_chosen_for_the_scales_as_stored(
    group_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs that have nothing to do with each other nothing can be made up for."""
    weight, hessian = weight_of(25, 96), torch.eye(96)
    settled: list[Settled] = []
    original = QuantLinear.settle

    def settle(self: QuantLinear, params: Any) -> Settled:
        settled.append(original(self, params))
        return settled[-1]

    monkeypatch.setattr(QuantLinear, "settle", settle)
    layer = by_gptq(weight, hessian, format="int3", group_size=group_size)
    (stored,) = settled
    rows, columns = torch.arange(25)[:, None], torch.arange(96)
    params = params_at(stored.params, rows, columns, 96, layer.group_size)
    codes = layer.format.encode(weight[..., None], params)
    expected = layer.format.decode(codes, params)[..., 0]
    torch.testing.assert_close(layer.dequantize(torch.float32), expected, rtol=0, atol=0)


def test_groups_are_fitted_to_what_errors_have_left() -> None:
    """The first group in the order sees the weights as they are, weighted by the Hessian."""
    weight, hessian = weight_of(8, 64), hessian_of(64)
    layer = by_gptq(weight, hessian, format="int3", group_size=32, scales="float")
    damped = hessian.diagonal() + 0.01 * hessian.diagonal().mean()
    first = int(column_order(damped, 32)[0]) // 32
    mine, others = (slice(32 * g, 32 * g + 32) for g in (first, 1 - first))
    scales = layer.quant_weight.scales.codes.view(8, 2)
    torch.testing.assert_close(
        scales[:, first], best(layer.format, weight[:, mine], damped[mine]).scales
    )
    untouched = best(layer.format, weight[:, others], damped[others]).scales
    assert not torch.allclose(scales[:, 1 - first], untouched, rtol=1e-3)


def test_order() -> None:
    importance = torch.tensor([1.0, 2.0, 9.0, 0.5, 4.0, 3.0])
    assert column_order(importance, 2).tolist() == [2, 3, 4, 5, 1, 0]
    assert column_order(importance, 6).tolist() == [2, 4, 5, 1, 0, 3]
    # groups of four end within rows
    assert column_order(importance, 4).tolist() == [2, 4, 5, 1, 0, 3]


def test_silent_inputs_take_the_nearest_codes() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(64)
    hessian[:8] = hessian[:, :8] = 0
    notes: list[str] = []
    layer = empty(weight, format="int4", group_size=32)
    layer.load(METHOD(layer, weight, hessian, SETTINGS, notes.append))
    assert len(notes) == 1 and "8 of 64 inputs" in notes[0]
    steps = layer.quant_weight.scales
    assert torch.isfinite(layer.dequantize(torch.float32)).all()
    off = (layer.dequantize(torch.float32) - weight)[:, :8].abs()
    # half a step, but where the range leaves outliers of inputs that never come out
    assert (off <= weight[:, :32].abs().amax(1, keepdim=True) / 7).float().mean() > 0.9
    assert steps.codes.numel() == 16


def test_fewer_tokens_than_inputs() -> None:
    weight, hessian = weight_of(), hessian_of(tokens=20)
    found = output_error(by_gptq(weight, hessian, format="int2"), weight, hessian)
    assert found < 0.3 * output_error(nearest(weight, format="int2"), weight, hessian)


def test_indefinite_hessian_is_named() -> None:
    weight, hessian = weight_of(8, 64), torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    notes: list[str] = []
    layer = empty(weight, format="int4")
    layer.load(METHOD(layer, weight, hessian, SETTINGS, notes.append))
    assert len(notes) == 1 and "damping raised to 0.1" in notes[0]
    assert torch.isfinite(layer.dequantize(torch.float32)).all()


def test_damping_is_that_of_the_recipe() -> None:
    weight, hessian = weight_of(), hessian_of()
    much = Quant(method="gptq", calibration=Calibration(damping=100.0))
    usual = by_gptq(weight, hessian, format="int2")
    # nothing is left of correlations: almost the nearest codes
    found = by_gptq(weight, hessian, much, format="int2")
    assert not torch.equal(found.weight, usual.weight)
    assert output_error(found, weight, hessian) > 1.5 * output_error(usual, weight, hessian)


def test_bfloat16_weights_and_no_hessian() -> None:
    weight, hessian = weight_of().bfloat16(), hessian_of()
    layer = by_gptq(weight, hessian, format="int4")
    assert torch.equal(layer.weight, by_gptq(weight.float(), hessian, format="int4").weight)
    with pytest.raises(ValueError, match="Hessian"):
        METHOD(layer, weight, None, SETTINGS, pytest.fail)
