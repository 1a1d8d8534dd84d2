"""Every method with every format: one call, tensors that the layer takes."""

from typing import get_args

import pytest
import torch
from quant_layers import empty, hessian_of, output_error, weight_of

from qtune.quant.format import format_names
from qtune.quant.method import method_names, quantize, shared_channels
from qtune.recipe_quant import MethodName, Quant

# rounds vectors of weights, see test_ldlq.py
FORMATS = [name for name in format_names() if name != "e8p"]


def test_words_of_the_recipe_are_files() -> None:
    assert set(get_args(MethodName)) <= set(method_names())
    assert set(method_names()) - set(get_args(MethodName)) <= {"ldlq"}


@pytest.mark.parametrize("name", get_args(MethodName))
@pytest.mark.parametrize("fmt", FORMATS)
def test_layer_takes_what_is_found(name: MethodName, fmt: str) -> None:
    weight, hessian = weight_of(), hessian_of()
    layer = empty(weight, format=fmt, channels=name == "awq")
    hessian_or_none = None if name == "nearest" else hessian
    tensors = quantize(layer, weight, hessian_or_none, Quant(method=name), pytest.fail)
    assert set(tensors) == set(layer.tensor_names)
    assert all(t.dtype == torch.uint8 for t in tensors.values())
    expected = {name: getattr(layer, name).shape for name in layer.tensor_names}
    assert {name: t.shape for name, t in tensors.items()} == expected
    layer.load(tensors)
    limit = 0.3 if layer.format.bits == 2 else 0.06
    assert output_error(layer, weight, hessian) < limit


def test_only_awq_has_factors_to_share() -> None:
    weight, hessian = weight_of(), hessian_of()
    layers = [empty(weight, channels=True), empty(weight, channels=True)]
    found = shared_channels(layers, [weight, weight], hessian, Quant(method="awq"))
    assert found is not None and found.shape == (128,)
    tensors = quantize(layers[0], weight, hessian, Quant(method="awq"), pytest.fail, found)
    assert torch.equal(tensors["channels"], found.half().view(torch.uint8))
    assert shared_channels(layers, [weight, weight], hessian, Quant(method="gptq")) is None


def test_notes_go_to_whoever_asked() -> None:
    weight, hessian = weight_of(), hessian_of()
    hessian[0] = hessian[:, 0] = 0
    notes: list[str] = []
    quantize(empty(weight), weight, hessian, Quant(method="gptq"), notes.append)
    assert notes == ["1 of 128 inputs are 0 throughout the calibration text"]
