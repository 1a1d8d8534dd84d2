"""Sums over groups of what the gradient of a weight would be, against float64."""

import pytest
import torch
from samples import Sample
from stored_samples import LEVELS, stored_sample
from torch import Tensor

from qtune_kernels.cpu import scale_gradient as module
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.scale_gradient import scale_gradient, takes

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")


def rows(made: Sample, num_rows: int) -> tuple[Tensor, Tensor]:
    """Random dy and x, bf16."""
    outs, ins = made.weights.shape
    return torch.randn(num_rows, outs).bfloat16(), torch.randn(num_rows, ins).bfloat16()


def check(made: Sample, dy: Tensor, x: Tensor) -> None:
    """Compare both sums with float64, entry by entry; weights of scale 1 are levels."""
    size = made.group_size
    assert takes(dy, x, size)
    found = scale_gradient(dy, x, made.packed, made.levels, size)
    gradient = (dy.double().T @ x.double()).flatten()
    filled = torch.nn.functional.pad
    for sums, factor in zip(found, (made.weights.flatten(), 1.0), strict=True):
        entries = gradient * factor
        groups = filled(entries, (0, -len(entries) % size)).view(-1, size)
        # float32 sums of exact products
        bound = groups.abs().sum(1).clamp(min=1e-3) * 1e-5
        assert ((sums.double() - groups.sum(1)).abs() < bound).all()


def levels_of(shape: tuple[int, int], bits: int, group_size: int) -> Sample:
    """A matrix whose weights are the levels of its codes."""
    made = stored_sample(shape, bits, torch.float32, None, group_size)
    scales = made.scales.codes.double().repeat_interleave(group_size)[: made.weights.numel()]
    # levels and steps are float32 numbers: the quotient is nearer to the level than to any other
    return made._replace(weights=(made.weights / scales.view(shape)).float().double())


@pytest.mark.parametrize("num_rows", [1, 32, 45])
@pytest.mark.parametrize("group_size", [16, 64, 96, 128])
@pytest.mark.parametrize("bits", LEVELS)
def test_both_sums(bits, group_size, num_rows) -> None:
    for shape in ((7, 64), (64, 192)):
        made = levels_of(shape, bits, group_size)
        check(made, *rows(made, num_rows))


@pytest.mark.parametrize("group_size", [64, 128])
def test_tiles_join(monkeypatch, group_size) -> None:
    made = levels_of((100, 192), 3, group_size)
    dy, x = rows(made, 32)
    whole = scale_gradient(dy, x, made.packed, made.levels, group_size)
    monkeypatch.setattr(module, "TILE", 1)
    module._rows_of_tile.cache_clear()
    parts = scale_gradient(dy, x, made.packed, made.levels, group_size)
    module._rows_of_tile.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_rows_that_lie_apart_and_threads() -> None:
    made = levels_of((64, 96), 4, 32)
    dy, x = torch.randn(33, 80).bfloat16()[:, 8:72], torch.randn(33, 128).bfloat16()[:, :96]
    check(made, dy, x)
    alone = scale_gradient(dy, x, made.packed, made.levels, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = scale_gradient(dy, x, made.packed, made.levels, 32)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_what_is_taken() -> None:
    dy, x = torch.empty(4, 48, dtype=torch.bfloat16), torch.empty(4, 64, dtype=torch.bfloat16)
    assert takes(dy, x, 64) and takes(dy, x, 64 * 512)
    assert not takes(dy, x, 8) and not takes(dy, x, 64 * 1024)
    assert not takes(dy.float(), x.float(), 64) and not takes(dy, x.float(), 64)
    assert not takes(dy[:0], x[:0], 64) and not takes(dy, x[:, :48], 64)
    assert not takes(dy.T.contiguous().T, x, 64)
