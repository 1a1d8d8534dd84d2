"""exp, exp2 and sigmoid against float64, rounding against PyTorch."""

import pytest
import torch

from qtune_kernels.cpu import math, processor
from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.simd import F32, LANES

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _apply(code: KernelCode, x: Pointer, y: Pointer, *, name: str, count: int) -> None:
    with code.share(count // LANES) as block:
        at = block * (4 * LANES)
        code.write(getattr(math, name)(code, code.read(x + at, F32)), y + at, F32)


@kernel
def _rounded(code: KernelCode, out: Pointer, low: Pointer, high: Pointer, *, way: str) -> None:
    code.store(math.to_bf16(code, *(code.read(part, F32) for part in (low, high))), out)


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


@pytest.mark.parametrize("way", ["the processor's", "by arithmetic"])
def test_float32_is_rounded_to_nearest_even(monkeypatch, way) -> None:
    if way == "by arithmetic":
        monkeypatch.setattr(processor, "rounds_to_bf16", lambda: False)
    x = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF] * 8, dtype=torch.int32)
    x = x.view(torch.float32) * torch.arange(1, 33)
    out = torch.empty(32, dtype=torch.bfloat16)
    _rounded(out.data_ptr(), x.data_ptr(), x[16:].data_ptr(), way=way)
    assert torch.equal(out, x.bfloat16())
