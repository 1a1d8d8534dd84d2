"""Nearest is what the layer does by itself, bitsandbytes' NF4 among it."""

import bitsandbytes.functional as bnb
import pytest
import torch
from quant_layers import empty, weight_of

from qtune.quant.methods.nearest import METHOD
from qtune.recipe_quant import Quant


def test_nf4_is_that_of_bitsandbytes() -> None:
    weight = weight_of(64, 128)
    layer = empty(weight)
    layer.load(METHOD(layer, weight, None, Quant(), pytest.fail))
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    expected = bnb.dequantize_4bit(codes, state).view_as(weight)
    assert torch.equal(layer.dequantize(torch.float32), expected)


@pytest.mark.parametrize("channels", [False, True])
def test_rotated_and_scaled_layers(channels: bool) -> None:
    weight = weight_of(64, 128)
    layer = empty(weight, format="int8", rotated=True, channels=channels)
    layer.load(METHOD(layer, weight, None, Quant(), pytest.fail))
    found = layer.dequantize(torch.float32)
    assert (found - weight).norm() < 0.01 * weight.norm()
