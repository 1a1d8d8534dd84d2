"""Squared errors for several choices of parameters, against float64 over all levels."""

import pytest
import torch
from stored_samples import LEVELS
from torch import Tensor

from qtune_kernels import clip_errors as module
from qtune_kernels.clip_errors import clip_errors

GROUPS, CHOICES = 23, 4


def arguments(
    group_size: int, shifted: bool, step: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = (torch.rand(CHOICES, GROUPS) * 2 + 0.5) * step
    zeros = torch.randint(0, 3, (CHOICES, GROUPS)) * 0.25 if shifted else None
    return torch.randn(GROUPS, group_size), scales, zeros


def truth(
    groups: Tensor, scales: Tensor, zeros: Tensor | None, levels: tuple[float, ...], weights: Tensor
) -> Tensor:
    """The least squared distance to any level, float64 [K, N]."""
    shifts = torch.zeros_like(scales) if zeros is None else zeros
    table = torch.tensor(levels or range(-127, 128), dtype=torch.float64)
    made = (table - shifts.double()[..., None]) * scales.double()[..., None]  # [K, N, levels]
    off = groups.double()[None, :, :, None] - made[:, :, None]
    return (off.square().amin(-1) * weights.double()).sum(-1)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("group_size", [16, 64, 100])
@pytest.mark.parametrize("bits", LEVELS)
def test_least_squared_distances(bits, group_size, shifted, kernel) -> None:
    groups, scales, zeros = arguments(group_size, shifted, 0.01 if bits == 8 else 1.0)
    importance = torch.rand(group_size)
    ask = clip_errors if kernel else module._plain
    for weights in (None, importance, torch.rand(GROUPS, 1), torch.rand(GROUPS, group_size)):
        found = ask(groups, scales, zeros, LEVELS[bits], weights)
        exact = truth(
            groups, scales, zeros, LEVELS[bits], torch.ones(1) if weights is None else weights
        )
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shifted", [True, False])
def test_the_op_is_well_formed(shifted) -> None:
    groups, scales, zeros = arguments(32, shifted)
    torch.library.opcheck(clip_errors, (groups, scales, zeros, LEVELS[4], groups.square()))


def test_groups_of_nothing_have_no_error() -> None:
    groups, scales = torch.zeros(2, 64), torch.zeros(3, 2)
    for levels in (LEVELS[4], LEVELS[8]):
        assert not clip_errors(groups, scales, None, levels, None).any()
        assert not module._plain(groups, scales, None, levels, None).any()
