"""The Triton kernels against the plain PyTorch version, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from samples import COUNTED, TABLES

from qtune_kernels import quantize as reference

kernels = pytest.importorskip("qtune_kernels.quantize_triton")

# a single weight, broken runs and groups, whole runs
SHAPES = [((1, 1), 64), ((7, 33), 16), ((41, 200), 32), ((13, 520), 64), ((3, 1024), 256)]
GUARD = 512


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN or the largest byte, so that what is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of different size between NaN, so that a read beyond them shows."""
    guarded = torch.full((shape[0] * shape[1] + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    spread = torch.rand(shape[0], 1, device=device) + 0.01
    return guarded[GUARD:-GUARD].view(shape).copy_(torch.randn(shape, device=device) * spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "group_size"), [*SHAPES, ((5, 4096), 16384)])
def test_largest_magnitudes_are_those_of_the_reference(shape, group_size, dtype, device) -> None:
    weight = random_weight(shape, dtype, device)
    truth = reference.absmax(weight.cpu(), group_size)
    assert torch.equal(kernels.absmax(weight, group_size).cpu(), truth)


def test_a_group_with_nan_has_no_largest_magnitude(device) -> None:
    weight = torch.zeros(4, 64, device=device)
    weight[2, 5] = torch.nan
    assert kernels.absmax(weight, 64).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
def test_bytes_are_those_of_the_reference(shape, group_size, levels, device) -> None:
    weight = random_weight(shape, torch.bfloat16, device)
    scales = reference.absmax(weight.cpu(), group_size)
    truth = reference.encode(weight.cpu(), scales, None, levels, group_size)
    packed = kernels.encode(weight, scales.to(device), None, levels, group_size)
    assert torch.equal(packed.cpu(), truth)


@pytest.mark.parametrize("levels", [*COUNTED.values(), ()], ids=[*COUNTED, "8 bits"])
@pytest.mark.parametrize("group_size", [32, 100, 7 * 64])
def test_zeros_and_any_group_size_give_the_bytes_of_the_reference(
    group_size, levels, device
) -> None:
    weight = random_weight((7, 130), torch.bfloat16, device)
    scales = reference.absmax(weight.cpu(), group_size)
    assert torch.equal(kernels.absmax(weight, group_size).cpu(), scales)
    scales /= 2 if levels else 100
    zeros = torch.rand(len(scales)) * 3
    truth = reference.encode(weight.cpu(), scales, zeros, levels, group_size)
    packed = kernels.encode(weight, scales.to(device), zeros.to(device), levels, group_size)
    assert torch.equal(packed.cpu(), truth)


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_more_than_one_program_writes(levels, device) -> None:
    weight = random_weight((3, kernels.PROGRAM_WEIGHTS // 2 + 1), torch.float32, device)
    scales = reference.absmax(weight.cpu(), 64)
    truth = reference.encode(weight.cpu(), scales, None, levels, 64)
    assert torch.equal(kernels.encode(weight, scales.to(device), None, levels, 64).cpu(), truth)
    assert torch.equal(kernels.absmax(weight, 64).cpu(), scales)


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_scales_of_any_sign_and_size(levels, device) -> None:
    weight = random_weight((6, 64), torch.float32, device)
    scales = torch.tensor([0.0, -0.3, 0.3, 1e-39, 1e30, -0.0])
    truth = reference.encode(weight.cpu(), scales, None, levels, 64)
    with np.errstate(over="ignore"):
        packed = kernels.encode(weight, scales.to(device), None, levels, 64)
    assert torch.equal(packed.cpu(), truth)


def test_tables_are_made_once(device) -> None:
    levels = TABLES["3 bits"]
    bounds, steps = kernels.search_tables(levels, device)
    assert kernels.search_tables(levels, device)[0] is bounds
    ascending = sorted(range(8), key=lambda code: levels[code])
    assert steps.cumsum(0).tolist() == ascending
