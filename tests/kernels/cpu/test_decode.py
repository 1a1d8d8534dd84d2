"""Decoding at any place of a matrix: the weights that the contract gives there."""

import pytest
import torch
from stored_samples import LEVELS, VARIANTS, stored_sample

from qtune_kernels.cpu import coded
from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.groups import Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _at(
    code: KernelCode,
    weights: Pointer,
    halves: Pointer,
    at: Integer,
    packed: Pointer,
    scale_codes: Pointer,
    scale_scales: Pointer,
    scale_offset: Pointer,
    zeros: Pointer,
    scale_map: Pointer,
    levels: Pointer,
    num_groups: Integer,
    *,
    layout: Layout,
    count: int,
) -> None:
    scales = (scale_codes, scale_scales, scale_offset, zeros, scale_map)
    matrix = Packed(code, Places(packed, *scales, levels, num_groups), layout)
    for part, weight in enumerate(matrix.weights(at, count)):
        code.store(weight, weights + 64 * part)
    if count == 2:
        code.store(matrix.halves(at), halves)


def check(bits, scales, zeros, group_size, count) -> None:
    made = stored_sample((32, 64), bits, scales, zeros, group_size)
    truth, places = made.weights.float().view(-1), coded.places(*made[:3])
    layout = coded.layout(*made[1:4])
    for at in range(0, 2048, 16 * count):
        found, halves = torch.empty(16 * count), torch.empty(32, dtype=torch.bfloat16)
        addresses = (found.data_ptr(), halves.data_ptr(), at)
        _at(*addresses, *places, layout=layout, count=count)
        assert torch.equal(found, truth[at : at + 16 * count])
        assert count != 2 or torch.equal(halves, found.bfloat16())


@pytest.mark.parametrize(("bits", "scales", "zeros"), VARIANTS)
def test_every_way_of_storing(bits, scales, zeros) -> None:
    check(bits, scales, zeros, 64, 2)


@pytest.mark.parametrize("group_size", [16, 24, 64, 96, 512])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("bits", LEVELS)
def test_weights_from_any_place_on(bits, count, group_size) -> None:
    check(bits, torch.int8, torch.float16, group_size, count)
