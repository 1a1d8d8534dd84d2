"""INT4 against the prototype's arithmetic in float64, and its known errors on normal values."""

from collections.abc import Callable

import pytest
import torch

from qtune.quant.format import load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import dequantize, quantize, storage_bytes
from qtune_kernels.scales import dequantize_scales, unpack_zeros

INT4 = load_format("int4")
STORAGE = Storage("int4")


def test_errors_on_normal_values(gaussian_error: Callable[..., float]) -> None:
    assert gaussian_error("int4", search=False) == pytest.approx(0.0083, rel=0.03)
    assert gaussian_error("int4", search=True) == pytest.approx(0.0076, rel=0.03)


def test_stored_zero_points_are_whole_and_scales_halves() -> None:
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    made = quantize(weight, STORAGE, 64)
    scales = dequantize_scales(made.scales)
    assert torch.equal(scales.half().float(), scales)
    assert made.scales.zeros is not None
    zeros = unpack_zeros(made.scales.zeros, 4, 480)
    assert set(zeros.tolist()) <= set(range(16))
    back = dequantize(made, INT4, 64, (96, 320), torch.float32).view(-1, 64).double()
    levels = (back / scales.double().unsqueeze(1) + zeros.double().unsqueeze(1)).round()
    assert levels.min() == 0 and levels.max() == 15
    exact = (levels - zeros.double().unsqueeze(1)) * scales.double().unsqueeze(1)
    assert torch.allclose(back, exact, rtol=1e-6, atol=0)


def test_bits_of_a_weight() -> None:
    size = sum(storage_bytes((1024, 1024), STORAGE).values())
    # codes, a byte for the scale of 64, 4 bits for their zero, 4 bytes for 256 scales
    assert size * 8 / 2**20 == pytest.approx(4 + 8 / 64 + 4 / 64 + 32 / (64 * 256), abs=1e-4)
