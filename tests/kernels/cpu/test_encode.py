"""Codes made by the CPU kernel: the nearest levels, and the bytes of `packing.pack`."""

import pytest
import torch
from stored_samples import LEVELS
from torch import Tensor

from qtune_kernels.cpu.encode import encode, encodes
from qtune_kernels.cpu.jit import available
from qtune_kernels.packing import pack

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

SHAPES = [(7, 64), (5, 107), (16, 192)]


def truth(weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, size: int) -> Tensor:
    """Storage bytes, by comparing each ratio with every level; of two as near, the lower one."""
    flat = weight.float().flatten()
    steps = scales.repeat_interleave(size)[: len(flat)]
    shifts = 0.0 if zeros is None else zeros.repeat_interleave(size)[: len(flat)]
    if bits == 8:
        return ((flat / steps + shifts).round().clamp(-127, 127) + 128).to(torch.uint8)
    levels, codes = torch.tensor(LEVELS[bits]).sort()
    ratios = flat * (1 / steps) + shifts
    rank = (ratios[:, None] > (levels[:-1] + levels[1:]) / 2).sum(1)
    return pack(codes[rank].to(torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("group_size", [16, 64, 100])
@pytest.mark.parametrize("bits", LEVELS)
def test_nearest_levels(bits, group_size, zeros, dtype) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        num_groups = -(-weight.numel() // group_size)
        scales = (torch.rand(num_groups) + 0.5) / (100 if bits == 8 else 1)
        shifts = torch.rand(num_groups) if zeros else None
        found = encode(weight, scales, shifts, LEVELS[bits], group_size)
        assert torch.equal(found, truth(weight, scales, shifts, bits, group_size))


@pytest.mark.parametrize("bits", LEVELS)
def test_halfway_between_two_levels(bits) -> None:
    levels = torch.tensor(LEVELS[bits] or [float(i) for i in range(-127, 128)]).sort()[0]
    weight = ((levels[:-1] + levels[1:]) / 2).repeat(5)
    scales = torch.ones(-(-len(weight) // 64))
    found = encode(weight, scales, None, LEVELS[bits], 64)
    assert torch.equal(found, truth(weight, scales, None, bits, 64))


@pytest.mark.parametrize("bits", LEVELS)
def test_groups_of_nothing(bits) -> None:
    weight, scales = torch.zeros(256), torch.zeros(4)
    found = encode(weight, scales, None, LEVELS[bits], 64)
    ones = truth(weight, torch.ones(4), None, bits, 64)
    assert torch.equal(found, ones)


def test_rows_that_lie_apart_and_threads() -> None:
    weight, scales = torch.randn(64, 40).T, torch.rand(40) + 0.5
    alone = encode(weight.contiguous(), scales, None, LEVELS[3], 64)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    together = encode(weight, scales, None, LEVELS[3], 64)
    torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_what_is_taken() -> None:
    assert encodes(torch.empty(3), 16)
    assert not encodes(torch.empty(3), 8)
    assert not encodes(torch.empty(3, dtype=torch.float64), 64)
    assert not encodes(torch.empty(3, device="meta"), 64)
