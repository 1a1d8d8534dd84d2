"""INT4 without zero points: levels, signs of scales, errors on normal values."""

from collections.abc import Callable

import pytest
import torch

from qtune.quant.format import Params, load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import quantize, storage_bytes
from qtune_kernels.scales import dequantize_scales

SYM = load_format("int4_sym")


def test_levels() -> None:
    assert SYM.levels == tuple(range(-8, 8))


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("int4_sym", search=True) == pytest.approx(0.0082, rel=0.03)


def test_a_sign_is_worth_a_tenth_of_the_error() -> None:
    groups = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    plain = Params(groups.abs().amax(1) / 7)
    signed = SYM.fit(groups)

    def error(params: Params) -> torch.Tensor:
        return (SYM.decode(SYM.encode(groups, params), params) - groups).square().sum()

    assert error(signed) < 0.9 * error(plain)


def test_stored_scales_are_halves_of_both_signs() -> None:
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    scales = dequantize_scales(quantize(weight, Storage("int4_sym"), 64).scales)
    assert torch.equal(scales.half().float(), scales)
    assert 0.3 < (scales > 0).float().mean() < 0.7


def test_bits_of_a_weight() -> None:
    size = sum(storage_bytes((1024, 1024), Storage("int4_sym")).values())
    assert size * 8 / 2**20 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
