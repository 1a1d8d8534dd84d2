"""INT8 against float64 arithmetic."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtune.quant.format import Params, load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import dequantize, quantize, storage_bytes
from qtune_kernels.scales import dequantize_scales

INT8 = load_format("int8")
STORAGE = Storage("int8")


def random_weight(seed: int = 0, rows: int = 96) -> Tensor:
    """Rows of very different size, as trained matrices have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) + 0.01
    return torch.randn(rows, 320, generator=generator) * spread * 0.05


def test_codes_are_the_nearest_integers() -> None:
    groups = random_weight().view(-1, 64)
    params = INT8.fit(groups)
    assert torch.allclose(params.scales, groups.abs().amax(1) / 127, rtol=1e-6)
    exact = groups.double() / params.scales.double().unsqueeze(1)
    codes = INT8.encode(groups, params).double() - 128
    assert (codes - exact).abs().max() <= 0.5 + 1e-5
    assert codes.abs().max() == 127


def test_error_is_half_a_step_of_the_stored_scale_and_what_lies_beyond_it() -> None:
    weight = random_weight()
    made = quantize(weight, STORAGE, 64)
    scales = dequantize_scales(made.scales).double().unsqueeze(1)
    groups = weight.double().view(-1, 64)
    back = dequantize(made, INT8, 64, (96, 320), torch.float32).double().view(-1, 64)
    bound = 0.5 * scales.abs() + (groups.abs() - 127 * scales.abs()).clamp(min=0)
    assert ((back - groups).abs() <= bound * (1 + 1e-5)).all()


def test_storing_scales_in_8_bits_costs_little() -> None:
    weight = random_weight(1, 512)
    groups = weight.view(-1, 64)
    params = INT8.fit(groups)
    ideal = INT8.decode(INT8.encode(groups, params), params).view_as(weight)
    back = dequantize(quantize(weight, STORAGE, 64), INT8, 64, (512, 320), torch.float32)
    assert (back - weight).norm() <= 1.1 * (ideal - weight).norm()


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_stored_scales_are_halves(size: float) -> None:
    scales = dequantize_scales(quantize(random_weight() * size, STORAGE, 64).scales)
    assert torch.equal(scales.half().float(), scales)


def test_decode_against_float64() -> None:
    codes = torch.arange(1, 256, dtype=torch.uint8).view(1, -1)
    scale = torch.tensor([0.37])
    exact = (codes.double() - 128) * scale.double()
    assert torch.allclose(INT8.decode(codes, Params(scale)).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-2, 1.0, 65504.0, 1e30, 3e38])
def test_extreme_sizes(size: float) -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0]]).repeat(1, 8) * size
    back = dequantize(quantize(weight, STORAGE, 64), INT8, 64, (1, 64), torch.float32)
    assert torch.allclose(back, weight, rtol=0, atol=0.6 / 127 * size)


def test_tiny_weights_need_scales_in_float32() -> None:
    # a linear scale is a whole number of the smallest step of float16, 6e-8
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0]]).repeat(1, 8) * 1e-30
    floats = quantize(weight, Storage("int8", scales="float"), 64)
    back = dequantize(floats, INT8, 64, (1, 64), torch.float32)
    assert torch.allclose(back, weight, rtol=0, atol=0.6 / 127 * 1e-30)
    linear = dequantize(quantize(weight, STORAGE, 64), INT8, 64, (1, 64), torch.float32)
    assert not linear.any()


def test_a_negative_stored_scale_still_keeps_signs() -> None:
    groups = torch.tensor([[0.001, -0.001, 0.002, 0.0]])
    params = Params(torch.tensor([-0.004 / 127]))
    back = INT8.decode(INT8.encode(groups, params), params)
    assert torch.allclose(back, groups, atol=0.002 / 127 + 1e-9)


def test_scale_zero_gives_zeros() -> None:
    params = Params(torch.zeros(1))
    codes = INT8.encode(torch.zeros(1, 64), params)
    assert codes.eq(128).all()
    assert not INT8.decode(codes, params).any()


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    # a twelfth of the squared step, which is a 127th of the largest of 64 values
    groups = torch.randn(1 << 14, 64, generator=torch.Generator().manual_seed(1)).double()
    exact = float((groups.abs().amax(1) / 127).square().mean() / 12)
    assert gaussian_error("int8", search=False) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("group_size", "bits"), [(64, 8.127), ("row", 8.0079), ("tensor", 8.0)])
def test_bits_of_a_weight(group_size: int | str, bits: float) -> None:
    size = sum(storage_bytes((1024, 1024), Storage("int8", group_size)).values())  # type: ignore[arg-type]
    assert size * 8 / 2**20 == pytest.approx(bits, abs=1e-3)
