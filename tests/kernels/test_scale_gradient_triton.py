"""The Triton kernel against float64, in tiles that end inside the matrix, with poisoned buffers."""

import pytest
import torch
from samples import error
from test_scale_gradient import TABLES, random_codes, truth
from torch import Tensor

triton_kernels = pytest.importorskip("qtune_kernels.scale_gradient_triton")

SHAPES = {
    "several tiles": ((40, 192), 64),
    "units of 16": ((33, 64), 16),
    "units of 32": ((20, 128), 32),
    "256 over rows": ((9, 64), 256),
    "rows": ((20, 320), 320),
    "tensor": ((17, 64), 17 * 64),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "BLOCK_O", 16)
    monkeypatch.setattr(triton_kernels, "BLOCK_I", 128)
    monkeypatch.setattr(triton_kernels, "BLOCK_T", 16)


def with_poisoned_room(rows: Tensor, room: int) -> Tensor:
    """The same rows, each with NaN behind it, so that what is read there shows."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + room), torch.nan)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("shape", "group_size"), SHAPES.values(), ids=SHAPES.keys())
def test_sums_are_those_of_float64(shape, group_size, levels, device) -> None:
    packed, values = random_codes(shape, levels)
    dy = torch.randn(19, shape[0]).bfloat16()
    x = torch.randn(19, shape[1]).bfloat16()
    assert triton_kernels.takes(dy, x, group_size)
    found = triton_kernels.scale_gradient(
        dy.to(device), x.to(device), packed.to(device), levels, group_size
    )
    # sums are float32 throughout: better than the entries rounded to bfloat16
    for sums, expected in zip(found, truth(dy, x, values, group_size), strict=True):
        assert sums.dtype == torch.float32
        assert error(sums.cpu(), expected) < 1e-5


def test_rows_may_lie_apart_and_neighbours_are_not_read(device) -> None:
    levels = TABLES["3 bits"]
    packed, values = random_codes((24, 64), levels)
    dy, x = torch.randn(5, 24).half(), torch.randn(5, 64).half()
    apart = with_poisoned_room(dy, 8).to(device), with_poisoned_room(x, 16).to(device)
    found = triton_kernels.scale_gradient(*apart, packed.to(device), levels, 64)
    for sums, expected in zip(found, truth(dy, x, values, 64), strict=True):
        assert error(sums.cpu(), expected) < 1e-5


def test_what_the_kernel_leaves_to_plain_pytorch() -> None:
    dy, x = torch.zeros(2, 8).bfloat16(), torch.zeros(2, 64).bfloat16()
    assert triton_kernels.takes(dy, x, 64) and triton_kernels.takes(dy, x, 192)
    assert not triton_kernels.takes(dy, x, 8)
    assert not triton_kernels.takes(dy, x, 100)
    assert not triton_kernels.takes(dy, torch.zeros(2, 100).bfloat16(), 64)
    assert not triton_kernels.takes(dy.float(), x.float(), 64)
    assert not triton_kernels.takes(dy.half(), x, 64)
