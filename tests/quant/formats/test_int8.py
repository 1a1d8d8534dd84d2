"""INT8 against float64 arithmetic."""

import pytest
import torch
from torch import Tensor

from qtune.quant.format import load_format
from qtune.quant.weight import dequantize, quantize
from qtune_kernels.scales import dequantize_scales

INT8 = load_format("int8")


def random_weight(seed: int = 0, rows: int = 96) -> Tensor:
    """Rows of very different size, as trained matrices have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) + 0.01
    return torch.randn(rows, 320, generator=generator) * spread * 0.05


def test_codes_are_the_nearest_integers() -> None:
    groups = random_weight().view(-1, 64)
    scales = INT8.fit(groups)
    assert torch.equal(scales, groups.abs().amax(1))
    exact = groups.double() / scales.double().unsqueeze(1) * 127
    codes = INT8.encode(groups, scales).double() - 128
    assert (codes - exact).abs().max() <= 0.5 + 1e-5
    assert codes.abs().max() == 127


def test_error_is_half_a_step_of_the_stored_scale_and_what_lies_beyond_it() -> None:
    weight = random_weight()
    made = quantize(weight, INT8, 64)
    scales = dequantize_scales(made.scales).double().unsqueeze(1)
    groups = weight.double().view(-1, 64)
    back = dequantize(made, INT8, 64, (96, 320), torch.float32).double().view(-1, 64)
    bound = 0.5 / 127 * scales.abs() + (groups.abs() - scales.abs()).clamp(min=0)
    assert ((back - groups).abs() <= bound * (1 + 1e-5)).all()


def test_storing_scales_in_8_bits_costs_little() -> None:
    weight = random_weight(1, 512)
    groups = weight.view(-1, 64)
    scales = INT8.fit(groups)
    ideal = INT8.decode(INT8.encode(groups, scales), scales).view_as(weight)
    back = dequantize(quantize(weight, INT8, 64), INT8, 64, (512, 320), torch.float32)
    assert (back - weight).norm() <= 1.05 * (ideal - weight).norm()


def test_decode_against_float64() -> None:
    codes = torch.arange(1, 256, dtype=torch.uint8).view(1, -1)
    scale = torch.tensor([0.37])
    exact = (codes.double() - 128) / 127 * scale.double()
    assert torch.allclose(INT8.decode(codes, scale).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-4, 65504.0, 1e30, 3e38])
def test_extreme_sizes(size: float) -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0]]).repeat(1, 8) * size
    back = dequantize(quantize(weight, INT8, 64), INT8, 64, (1, 64), torch.float32)
    assert torch.allclose(back, weight, rtol=0, atol=0.6 / 127 * size)


def test_a_negative_stored_scale_still_keeps_signs() -> None:
    # 8 bits cannot tell a tiny scale from its neighbours: it may come out with the wrong sign
    groups = torch.tensor([[0.001, -0.001, 0.002, 0.0]])
    scales = torch.tensor([-0.004])
    back = INT8.decode(INT8.encode(groups, scales), scales)
    assert torch.allclose(back, groups, atol=0.002 / 127 + 1e-9)


def test_scale_zero_gives_zeros() -> None:
    scales = torch.zeros(1)
    codes = INT8.encode(torch.zeros(1, 64), scales)
    assert codes.eq(128).all()
    assert not INT8.decode(codes, scales).any()
