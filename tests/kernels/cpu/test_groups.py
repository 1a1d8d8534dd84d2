"""Scale and zero of any group: those of `scales.py`, in every way of storing."""

import pytest
import torch
from stored_samples import SCALE_KINDS, VARIANTS, ZERO_KINDS, stored_sample

from qtune_kernels.cpu import coded
from qtune_kernels.cpu.groups import Groups, Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.scales import dequantize_scales, unpack_zeros

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _shared(
    code: KernelCode,
    scale: Pointer,
    zero: Pointer,
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
) -> None:
    parts = (scale_codes, scale_scales, scale_offset, zeros, scale_map)
    groups = Groups(code, Places(packed, *parts, levels, num_groups), layout)
    scales, subtracted = groups.lanes(at)
    code.store(scales, scale)
    if subtracted is not None:
        code.store(subtracted, zero)


def shared(made, at) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of 16 weights; zeros stay 0 where there are none."""
    scale, zero = torch.empty(16), torch.zeros(16)
    addresses = (scale.data_ptr(), zero.data_ptr(), at, *coded.places(*made[:3]))
    _shared(*addresses, layout=coded.layout(*made[1:4]))
    return scale, zero


@pytest.mark.parametrize("group_size", [16, 20, 64])
@pytest.mark.parametrize("zeros", ZERO_KINDS)
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_those_of_the_weights_from_any_place_on(scales, zeros, group_size) -> None:
    made = stored_sample((300, 64), 3, scales, zeros, group_size)
    num_groups = made.scales.codes.numel()
    all_scales, all_zeros = dequantize_scales(made.scales), torch.zeros(num_groups)
    if zeros is not None:
        all_zeros = unpack_zeros(made.scales.zeros, 3, num_groups)
    for at in range(0, 300 * 64, 16 * 37):
        own = torch.arange(at, at + 16) // group_size
        scale, zero = shared(made, at)
        assert torch.equal(scale, all_scales[own]) and torch.equal(zero, all_zeros[own])


@pytest.mark.parametrize(("bits", "scales", "zeros"), VARIANTS[:6])
def test_past_the_last_group_is_the_last(bits, scales, zeros) -> None:
    made = stored_sample((1, 40), bits, scales, zeros, 16)
    last, beyond = shared(made, 32), shared(made, 4096)
    assert all(torch.equal(a, b) for a, b in zip(last, beyond, strict=True))
