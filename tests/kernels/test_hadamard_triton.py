"""The rotation's Triton kernel against the plain version in float64, guarded and poisoned."""

import math
from collections.abc import Iterator

import pytest
import torch
from samples import error

from qtune_kernels.hadamard import hadamard
from qtune_kernels.hadamard_matrices import orders

kernels = pytest.importorskip("qtune_kernels.hadamard_triton")

DTYPES = [torch.bfloat16, torch.float16]
GUARD = 64
# a wide outermost matrix, two and three factors, blocks, less than a tensor core's side
WIDTHS = [576, 192, 896, 2240, 152, 640, 7]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers between NaN, so that a read beyond them shows."""
    values = torch.randn(shape, device=device)
    around = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    return around[GUARD:-GUARD].view(shape).copy_(values)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_results_are_rounded_once(width, dtype, transposed, device) -> None:
    x = guarded((3, width), dtype, device)
    y = kernels.hadamard(x, transposed, 1)
    assert y.dtype == dtype and y.shape == x.shape
    assert error(y, hadamard(x.double(), transposed, 1)) < torch.finfo(dtype).eps


def test_rows_that_do_not_fill_a_program_are_no_trouble(device) -> None:
    rows = kernels.tile(192).rows
    x = guarded((rows + 1, 192), torch.bfloat16, device)
    torch.testing.assert_close(kernels.hadamard(x, False, 0), hadamard(x, False, 0))


def test_operands_may_lie_anyhow(device) -> None:
    x = guarded((192, 3), torch.bfloat16, device).T
    torch.testing.assert_close(kernels.hadamard(x, False, 0), hadamard(x.contiguous(), False, 0))


@pytest.mark.parametrize("width", [576, 1536, 4864, 8960, 18944, 11008, 14336, 28672, 3584, 5120])
def test_widths_of_real_models_fit_a_program(width) -> None:
    plan = kernels.tile(width)
    assert plan is not None and math.prod(plan.sizes) == width
    assert all(
        math.prod(group) == size for group, size in zip(plan.groups, plan.sizes, strict=True)
    )
    assert sum(plan.groups, ()) == orders(width).factors


def test_what_is_too_wide_or_float32_is_left_to_the_plain_version() -> None:
    assert kernels.takes(torch.empty(1, 576, dtype=torch.bfloat16))
    assert not kernels.takes(torch.empty(1, 53248, dtype=torch.bfloat16))
    assert not kernels.takes(torch.empty(1, 576))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [576, 1536, 4864, 8960, 11008, 14336, 28672, 53248])
def test_the_op_runs_this_kernel_on_a_gpu(width, device) -> None:
    x = torch.randn(40, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    torch.library.opcheck(hadamard, (x, False, 0))
    assert error(hadamard(x), hadamard(x.detach().double())) < 0.01
