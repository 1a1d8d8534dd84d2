"""The corrected interpreter against PyTorch, on what the stock one gets wrong."""

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU here", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from interpreter import to_bfloat16, to_float32  # noqa: E402


@triton.jit
def _arithmetic_kernel(left_ptr, right_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    left = tl.load(left_ptr + at)
    right = tl.load(right_ptr + at)
    tl.store(out_ptr + at, left * right + left)


@triton.jit
def _dot_kernel(left_ptr, right_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.dot(tl.load(left_ptr + at), tl.trans(tl.load(right_ptr + at)))
    tl.store(out_ptr + at, sums)


@triton.jit
def _convert_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(in_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _count_kernel(first, last, out_ptr):
    count = 0
    for _ in range(first, last // 2):
        count += 1
    tl.store(out_ptr, count)


@triton.jit
def _assembly_kernel(in_ptr, low_ptr, high_ptr, TEXT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    low, high = tl.inline_asm_elementwise(
        TEXT, "=r,=r,r", [tl.load(in_ptr + at)], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
    )
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


pytestmark = pytest.mark.usefixtures("device")


def test_rounding_is_that_of_torch() -> None:
    values = torch.cat([torch.randn(10_000) * 1e3, torch.tensor([torch.inf, 1e38, 0.0, -0.0])])
    high_halves = torch.randint(0, 1 << 14, (1000,), dtype=torch.int32)
    ties = (high_halves << 16 | 0x8000).view(torch.float32)
    for tensor in (values, ties):
        bits = to_bfloat16(tensor.numpy())
        truth = tensor.bfloat16()
        assert np.array_equal(bits.view(np.int16), truth.view(torch.int16).numpy())
        assert np.array_equal(to_float32(bits), truth.float().numpy())
    assert np.isnan(to_float32(to_bfloat16(np.array([np.nan]))))


def test_products_and_sums() -> None:
    left, right = torch.randn(2, 256).bfloat16()
    out = torch.empty(256, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](left, right, out, BLOCK=256)
    assert torch.equal(out, left * right + left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_are_summed_in_float32(dtype) -> None:
    left, right = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](left, right, out, BLOCK=16)
    torch.testing.assert_close(out, left.float() @ right.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.uint8, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
    ],
)
def test_conversions(source: torch.dtype, target: torch.dtype) -> None:
    values = (torch.rand(512) * 250).to(source)
    out = torch.empty(512, dtype=target)
    _convert_kernel[(1,)](values, out, BLOCK=512)
    assert torch.equal(out, values.to(target))


def test_loops_with_run_time_bounds() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](3, 20, out)
    assert out.item() == 7


def test_inline_assembly_sees_packed_elements() -> None:
    stored = torch.randint(0, 256, (64,), dtype=torch.uint8)
    low, high = torch.zeros(2, 64, dtype=torch.uint8)
    text = """{
        .reg .b32 t;
        and.b32 $0, $2, 0x0f0f0f0f;
        shr.u32 t, $2, 4;
        and.b32 $1, t, 0x0f0f0f0f;
    }"""
    _assembly_kernel[(1,)](stored, low, high, TEXT=text, BLOCK=64)
    assert torch.equal(low, stored & 15) and torch.equal(high, stored >> 4)
