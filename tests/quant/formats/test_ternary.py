"""Ternary against BitNet's formula, and the analytic error on normal values."""

from collections.abc import Callable
from math import erfc, exp, pi, sqrt

import pytest
import torch

from qtune.quant.format import load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import dequantize, quantize

TERNARY = load_format("ternary")


def test_rounded_as_bitnet_does() -> None:
    groups = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).double()
    scale = groups.abs().mean(1, keepdim=True)
    exact = (groups / scale).round().clamp(-1, 1) * scale
    params = TERNARY.fit(groups.float())
    found = TERNARY.decode(TERNARY.encode(groups.float(), params), params)
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=0)


def test_the_fourth_code_is_never_chosen() -> None:
    groups = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    codes = TERNARY.encode(groups, TERNARY.fit(groups))
    assert set(codes.unique().tolist()) == {0, 1, 2}


def test_error_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    scale = sqrt(2 / pi)
    density, tail = exp(-(scale**2) / 8) / sqrt(2 * pi), erfc(scale / 2 / sqrt(2)) / 2
    exact = 1 - 4 * scale * density + 2 * scale**2 * tail
    found = gaussian_error("ternary", search=False, group_size=4096)
    assert found == pytest.approx(exact, rel=0.01)


def test_a_matrix_of_bitnet_has_one_scale() -> None:
    weight = torch.randn(48, 100, generator=torch.Generator().manual_seed(0))
    storage = Storage("ternary", group_size="tensor", scales="float")
    made = quantize(weight, storage, 4800)
    back = dequantize(made, TERNARY, 4800, (48, 100), torch.float32)
    scale = weight.abs().mean()
    assert torch.allclose(back, (weight / scale).round().clamp(-1, 1) * scale)
