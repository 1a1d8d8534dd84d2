"""The fused kernels with an adapter against float64; that they work without is tested elsewhere."""

from collections.abc import Iterator

import pytest
import torch
from samples import NF4, error, sample
from torch import Tensor

from qtune_kernels.linear_tiles import Tile

kernels = pytest.importorskip("qtune_kernels.linear_triton")
from qtune_kernels.lora_triton import Adapter, adapter_arguments  # noqa: E402

FEW = Tile(16, 32, warps=2, stages=2, few_rows=True)
MANY = Tile(16, 32, warps=4, stages=2)
DTYPES = [torch.bfloat16, torch.float16]
SCALING = 1.5


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def matrix(num_rows: int, width: int, device: torch.device) -> Tensor:
    """Random float32 rows with NaN behind the last, so that a read beyond them shows."""
    guarded = torch.full((num_rows * width + 256,), torch.nan, device=device)
    return guarded[:-256].view(num_rows, width).copy_(torch.randn(num_rows, width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("rank", [1, 4, 16, 33, 70])
# one part of the sum, and several
@pytest.mark.parametrize("shape", [(45, 384), (7, 1152)], ids=str)
def test_the_adapter_is_added_once(shape, rank, tile, dtype, device) -> None:
    made = sample(shape, NF4).to(device)
    num_rows = 5 if tile.few_rows else 19
    x, u = (torch.randn(num_rows, n, device=device).to(dtype) for n in (shape[1], rank))
    b, bias = matrix(shape[0], rank, device) / 4, torch.randn(shape[0], device=device).to(dtype)
    weight = (made.packed, made.scales, made.levels, made.group_size)
    y = kernels.linear(x, *weight, shape[0], bias, tile, Adapter(u, b, SCALING))
    truth = x.double() @ made.weights.T + bias.double() + SCALING * u.double() @ b.double().T
    plain = x @ made.weights.to(dtype).T + bias + SCALING * (u @ b.to(dtype).T)
    assert error(y, truth) <= 2 * error(plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 33, 70])
@pytest.mark.parametrize("shape", [(45, 384), (301, 128)], ids=str)
def test_its_gradient_is_added_once(shape, rank, dtype, device) -> None:
    made = sample(shape, NF4).to(device)
    dy, v = (torch.randn(19, n, device=device).to(dtype) for n in (shape[0], rank))
    a = matrix(rank, shape[1], device) / 4
    weight = (made.packed, made.scales, made.levels, made.group_size)
    dx = kernels.linear_dx(dy, *weight, shape[1], MANY, Adapter(v, a))
    truth = dy.double() @ made.weights + v.double() @ a.double()
    plain = dy @ made.weights.to(dtype) + v @ a.to(dtype)
    assert error(dx, truth) <= 2 * error(plain, truth)


def test_without_an_adapter_the_kernels_get_nothing() -> None:
    assert adapter_arguments(None) == {}
    found = adapter_arguments(Adapter(torch.ones(4, 8).T, torch.ones(5, 4), 2.0))
    assert (found["RANK"], found["scaling"]) == (4, 2.0)
    assert found["narrow_ptr"].is_contiguous()
