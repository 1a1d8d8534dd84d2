"""Decoding on the CPU gives the bits of the contract, for every way of storing, and every group."""

import pytest
import torch
from stored_samples import LEVELS, VARIANTS, stored_sample

from qtune_kernels.cpu.dequantize import dequantize_into, dequantizes
from qtune_kernels.cpu.jit import available
from qtune_kernels.dequantize import plain_into, stored_weights

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

SHAPES = [(7, 64), (5, 192), (16, 100)]


def check(shape, bits, scales, zeros, group_size, dtype) -> None:
    made = stored_sample(shape, bits, scales, zeros, group_size)
    found = torch.full((stored_weights(made.packed, made.levels),), torch.nan, dtype=dtype)
    assert dequantizes(found, made.scales, made.levels, group_size)
    dequantize_into(found, made.packed, made.scales, made.levels, group_size)
    truth = made.weights.float().to(dtype)
    assert torch.equal(found[: truth.numel()].view(shape), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "scales", "zeros"), VARIANTS)
def test_every_way_of_storing(bits, scales, zeros, dtype) -> None:
    # sizes cost nothing, a kernel for another way of storing 0.1 s
    for shape in SHAPES:
        check(shape, bits, scales, zeros, 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [16, 32, 48, 100, 128, 576, 1024])
@pytest.mark.parametrize("bits", LEVELS)
def test_every_size_of_groups(bits, group_size, dtype) -> None:
    zeros = torch.float32 if bits == 8 else torch.uint8
    for shape in SHAPES:
        check(shape, bits, torch.int8, zeros, group_size, dtype)


@pytest.mark.parametrize("bits", LEVELS)
def test_groups_past_the_last_are_not_read(bits) -> None:
    # the filling at the end of storage belongs to none, and behind the scales there may be nothing
    made = stored_sample((3, 20), bits, torch.float32, torch.float32, 16)
    poisoned = torch.full((2, 64), torch.nan)
    scales, zeros = (
        row[:4].copy_(part)
        for row, part in zip(poisoned, (made.scales.codes, made.scales.zeros), strict=True)
    )
    scales = made.scales._replace(codes=scales, zeros=zeros)
    found = torch.empty(-(-stored_weights(made.packed, made.levels) // 64) * 64)
    packed = torch.nn.functional.pad(made.packed, (0, 64))
    dequantize_into(found, packed, scales, made.levels, 16)
    assert found.isfinite().all()


@pytest.mark.parametrize("bits", LEVELS)
def test_plain_torch_gives_the_same(bits) -> None:
    made = stored_sample((16, 192), bits, torch.int8, torch.float16, 32)
    truth, found = (torch.empty(16 * 192) for _ in range(2))
    plain_into(truth, made.packed, made.scales, made.levels, 32)
    dequantize_into(found, made.packed, made.scales, made.levels, 32)
    assert torch.equal(found, truth)


def test_what_is_left_to_plain_torch() -> None:
    made = stored_sample((4, 64), 4)
    rest = (made.scales, made.levels, 64)
    assert dequantizes(torch.empty(256), *rest)
    assert not dequantizes(torch.empty(64, dtype=torch.float16), *rest)
    assert not dequantizes(torch.empty(64, device="meta"), *rest)
    assert not dequantizes(torch.empty(100), *rest)
    assert not dequantizes(torch.empty(64), made.scales, made.levels, 8)
    whole = made.scales._replace(zeros=torch.zeros(2, dtype=torch.uint8))
    assert not dequantizes(torch.empty(64), whole, (), 64)
    wide = made.scales._replace(codes=torch.zeros(4, dtype=torch.float64))
    assert not dequantizes(torch.empty(64), wide, made.levels, 64)
