"""The language of the CPU kernels: what is written against what PyTorch computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.simd import BF16, F32, I8, I16, I32, I64, LANES, Value, vector

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.int32: I32, torch.uint8: I8}


@kernel
def _compute(
    code: KernelCode,
    result: Pointer,
    x: Pointer,
    y: Pointer,
    *,
    formula: Callable[[KernelCode, Value, Value], Value],
    kind: torch.dtype,
) -> None:
    a, b = (code.load(address, vector(KINDS[kind])) for address in (x, y))
    code.store(formula(code, a, b), result)


def compute(formula, x: Tensor, y: Tensor, out: torch.dtype | None = None) -> Tensor:
    result = torch.zeros(LANES, dtype=out or x.dtype)
    addresses = (tensor.data_ptr() for tensor in (result, x, y))
    _compute(*addresses, formula=formula, kind=x.dtype)
    return result


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x / y,
        lambda x, y: 2.5 * x + 1.0 - y,
        lambda x, y: 1.0 / x,
        lambda x, y: -x,
    ],
)
def test_arithmetic_of_floats(formula) -> None:
    x, y = torch.randn(LANES), torch.randn(LANES)
    found = compute(lambda code, a, b: formula(a, b), x, y)
    assert torch.equal(found, formula(x, y))


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, y: x + y,
        lambda x, y: x * 3 - y,
        lambda x, y: x & y,
        lambda x, y: x | y,
        lambda x, y: x ^ y,
        lambda x, y: x << 3,
        lambda x, y: x >> 2,
        lambda x, y: x // y,
        lambda x, y: x % y,
    ],
)
def test_arithmetic_of_integers(formula) -> None:
    x, y = (torch.randint(1, 1 << 20, (LANES,), dtype=torch.int32) for _ in range(2))
    found = compute(lambda code, a, b: formula(a, b), x, y)
    assert torch.equal(found, formula(x, y))


@pytest.mark.parametrize(
    ("formula", "truth"),
    [
        (lambda code, a, b: code.select(a < b, a, b), torch.minimum),
        (lambda code, a, b: code.select(a > b, a, b), torch.maximum),
        (lambda code, a, b: code.select(a >= b, a, 0.0), lambda x, y: x.where(x >= y, 0)),
        (lambda code, a, b: code.select(a.equals(b), a, 7.0), lambda x, y: x.where(x == y, 7)),
        (lambda code, a, b: code.largest(a, b), torch.maximum),
        (lambda code, a, b: code.sqrt(a * a), lambda x, y: x.square().sqrt()),
        (lambda code, a, b: code.spread(code.max(a)), lambda x, y: x.max().expand(LANES)),
        (lambda code, a, b: code.spread(a[3]), lambda x, y: x[3].expand(LANES)),
        (
            lambda code, a, b: a.shuffle(b, [*range(8), *range(24, 32)]),
            lambda x, y: torch.cat([x[:8], y[8:]]),
        ),
        (lambda code, a, b: a.bits(vector(I32)).bits(vector(F32)), lambda x, y: x),
        (lambda code, a, b: a.to(BF16).to(F32), lambda x, y: x.bfloat16().float()),
        (lambda code, a, b: a.to(I32).signed_to(F32), lambda x, y: x.trunc()),
    ],
)
def test_functions(formula, truth) -> None:
    x, y = torch.randn(LANES) * 10, torch.randn(LANES) * 10
    y[:4] = x[:4]
    assert torch.equal(compute(formula, x, y), truth(x, y))


def test_a_sum_of_lanes() -> None:
    x = torch.randn(LANES)
    found = compute(lambda code, a, b: code.spread(code.sum(a)), x, x)
    torch.testing.assert_close(found, x.double().sum().float().expand(LANES))


def test_a_fused_product_is_rounded_once() -> None:
    x = torch.full((LANES,), 1 + 2.0**-12)
    found = compute(lambda code, a, b: code.fma(a, b, -1.0), x, x)
    assert torch.equal(found, (x.double() * x.double() - 1).float())


def test_bytes_become_numbers_without_sign() -> None:
    x = torch.arange(0, 256, 16, dtype=torch.uint8)
    found = compute(lambda code, a, b: a.to(F32), x, x, torch.float32)
    assert torch.equal(found, x.float())


def test_bf16_is_rounded_to_nearest_even() -> None:
    x = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF] * 4, dtype=torch.int32)
    x = x.view(torch.float32)
    found = compute(lambda code, a, b: a.to(BF16), x, x, torch.bfloat16)
    assert torch.equal(found, x.bfloat16())


@kernel
def _total(
    code: KernelCode, result: Pointer, numbers: Pointer, start: Integer, stop: Integer
) -> None:
    total = code.variable(code.value(0, I64))
    with code.loop(stop, start, 2) as index:
        number = code.load(numbers + index * 8, I64)
        with code.when(number < 50):
            total.set(total.get() + number)
    code.store(total.get(), result)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (1, 10), (3, 3), (9, 4)])
def test_a_loop_with_a_branch(start, stop) -> None:
    numbers, result = torch.randint(0, 100, (10,)), torch.zeros(1, dtype=torch.int64)
    _total(result.data_ptr(), numbers.data_ptr(), start, stop)
    chosen = numbers[start:stop:2]
    assert result.item() == chosen[chosen < 50].sum().item()


@kernel
def _copy(code: KernelCode, out: Pointer, x: Pointer, count: Integer) -> None:
    live = code.first_lanes(count)
    code.write(code.read(x, BF16, live) + 1.0, out, BF16, live)


@pytest.mark.parametrize("count", [0, 1, 15, 16])
def test_lanes_that_are_not_live_are_left_alone(count) -> None:
    x, out = torch.randn(LANES).bfloat16(), torch.full((LANES,), torch.nan, dtype=torch.bfloat16)
    _copy(out.data_ptr(), x.data_ptr(), count)
    assert torch.equal(out[:count], x[:count] + 1)
    assert out[count:].isnan().all()


@kernel
def _through_memory(code: KernelCode, out: Pointer, x: Pointer) -> None:
    own = code.stack(64)
    code.store(code.constants(range(32), I16), own)
    code.store(code.load(own + 32, vector(I16)), out)
    code.store(code.load(x, I8), out + 1)


def test_memory_of_the_function_and_unaligned_addresses() -> None:
    out, x = torch.zeros(LANES, dtype=torch.int16), torch.tensor([7], dtype=torch.uint8)
    _through_memory(out.data_ptr(), x.data_ptr())
    assert out.tolist() == [16 + 7 * 256, *range(17, 32)]
