"""The norm's CPU kernels against the plain version: strides, odd widths, threads, guards."""

from collections.abc import Iterator

import pytest
import torch
from samples import error

from qtune_kernels import norm as plain
from qtune_kernels.cpu import norm as native
from qtune_kernels.cpu.jit import available

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

EPS = 1e-5
WIDTHS = [1, 16, 40, 64, 150]


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def guarded(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows [T, I] that lie apart, NaN between them."""
    around = torch.full((rows + 2, width + 24), torch.nan, dtype=dtype)
    return around[1:-1, :width].copy_(torch.randn(rows, width))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_results_are_those_of_plain_torch(width, dtype, offset) -> None:
    x, residual, dy, added = (guarded(5, width, dtype) for _ in range(4))
    weight = guarded(width, 1, dtype)[:, 0]
    settings = weight, EPS, offset
    ours = (
        native.rms_norm(x, *settings),
        *native.add_rms_norm(x, residual, *settings),
        native.rms_norm_dx(dy, x, *settings, None),
        native.rms_norm_dx(dy, x, *settings, added),
    )
    right = (
        plain._rms_norm(x, *settings),
        *plain._add_rms_norm(x, residual, *settings),
        plain._rms_norm_dx(dy, x, *settings, None),
        plain._rms_norm_dx(dy, x, *settings, added),
    )
    for one, other in zip(ours, right, strict=True):
        assert one.is_contiguous() and one.dtype == dtype
        # the gradient of a lone element all but vanishes
        assert width == 1 or error(one, other.double()) < torch.finfo(dtype).eps
        torch.testing.assert_close(one, other)


def test_more_threads_than_rows_are_no_trouble() -> None:
    x, weight = torch.randn(1, 40), torch.randn(40)
    assert error(native.rms_norm(x, weight, EPS, 0.0), plain._rms_norm(x, weight, EPS, 0.0)) < 1e-6
