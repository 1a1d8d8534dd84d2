"""Rows in 8 bits: codes, scales and which layers have them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtune.export.exporter import Trained
from qtune.export.folder.channels import (
    encoded_bytes,
    encoded_merge,
    fp8_channels,
    int8_channels,
)
from qtune.export.folder.dense import dense_tensors
from qtune.model.merge import quant_layers
from qtune.recipe import Quant


def weights(dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, one of them zero."""
    torch.manual_seed(0)
    rows = torch.randn(64, 96) * torch.logspace(-4, 2, 64).unsqueeze(1)
    rows[7] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = weights(dtype)
    codes, scales = int8_channels(weight)
    assert codes.dtype == torch.int8 and scales.dtype == dtype and scales.shape == (64, 1)
    assert int(codes.min()) == -127 or int(codes.max()) == 127
    error = (codes.double() * scales.double() - weight.double()).abs()
    # a scale that was rounded down cuts the largest number by up to its own rounding more
    most = 0.5 + 127 * torch.finfo(dtype).eps / 2
    assert (error <= most * scales.double()).all()
    assert (codes[7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_is_the_nearest_number(dtype: torch.dtype) -> None:
    weight = weights(dtype)
    codes, scales = fp8_channels(weight)
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == dtype
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    ratios = weight.double() / scales.double()
    nearest = (ratios.unsqueeze(-1) - every).abs().amin(-1)
    torch.testing.assert_close((ratios - codes.double()).abs(), nearest, rtol=1e-6, atol=1e-6)
    assert codes.double().isfinite().all()


def test_only_layers_that_would_be_quantized_are_encoded(train: Callable[..., Trained]) -> None:
    trained = train("qwen2", quant=Quant(format=None, skip=("lm_head", "k_proj")))
    found = dict(encoded_merge(trained, lambda prefix, weight: [(f"{prefix}seen", weight)]))
    seen = {name.removesuffix("seen") for name in found if name.endswith("seen")}
    quantized = train("qwen2", quant=Quant(skip=("lm_head", "k_proj")))
    assert seen == {name.removesuffix("weight") for name in quant_layers(quantized.model)}
    for name, tensor in dense_tensors(trained):
        written = found.get(name, found.get(f"{name.removesuffix('weight')}seen"))
        assert torch.equal(written, tensor)


def test_bytes_are_one_for_each_encoded_weight(train: Callable[..., Trained]) -> None:
    def encode(prefix: str, weight: Tensor) -> list[tuple[str, Tensor]]:
        return [(f"{prefix}codes", int8_channels(weight)[0])]

    for quant in (Quant(), Quant(format=None)):
        trained = replace(train("qwen2", quant=quant), onto="original")
        written = sum(tensor.nbytes for _, tensor in encoded_merge(trained, encode))
        assert written <= encoded_bytes(trained) < 1.1 * written + 10_000
