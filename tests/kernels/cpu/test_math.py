"""exp, exp2 and sigmoid against float64."""

import pytest
import torch

from qtune_kernels.cpu import math
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.simd import F32, LANES

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _apply(code: KernelCode, x: Pointer, y: Pointer, *, name: str, count: int) -> None:
    with code.share(count // LANES) as block:
        at = block * (4 * LANES)
        code.write(getattr(math, name)(code, code.read(x + at, F32)), y + at, F32)


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, torch.nan)
    _apply(x.data_ptr(), y.data_ptr(), name=name, count=x.numel())
    return y


@pytest.mark.parametrize("name", ["exp", "exp2", "sigmoid"])
@pytest.mark.parametrize("largest", [1.0, 87.0])
def test_errors_are_those_of_float32(name: str, largest: float) -> None:
    x = torch.linspace(-largest, largest, 160_000)
    truth = getattr(torch, name)(x.double())
    assert ((run(name, x).double() - truth) / truth).abs().max() < 2e-7


def test_exp_meets_the_ends_of_float32() -> None:
    x = torch.tensor([-torch.inf, -200, -104, -103, -90, 0, 88.7, 89, 1e9, torch.inf, torch.nan])
    found = run("exp", torch.cat([x, torch.zeros(LANES - len(x))]))[: len(x)]
    torch.testing.assert_close(found, x.double().exp().float(), equal_nan=True, rtol=1e-6, atol=0)


def test_exp2_ends_in_zero() -> None:
    x = torch.tensor([-150.0, -1e4, -1e30, 0.0] * 4)
    assert run("exp2", x)[:4].tolist() == [0, 0, 0, pytest.approx(1)]


def test_sigmoid_ends_in_zero_and_one() -> None:
    x = torch.tensor([-torch.inf, -1e9, 1e9, torch.inf] * 4)
    assert run("sigmoid", x)[:4].tolist() == [0, 0, 1, 1]
