"""The gated activation's CPU kernels against the plain version: strides, odd widths, guards."""

import pytest
import torch
from samples import error

from qtune_kernels import swiglu as plain
from qtune_kernels.cpu import gated as native
from qtune_kernels.cpu.jit import available

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


def guarded(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows [T, I] that lie apart, NaN between them."""
    around = torch.full((rows + 2, width + 24), torch.nan, dtype=dtype)
    return around[1:-1, :width].copy_(3 * torch.randn(rows, width))


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 16, 40, 64, 150])
def test_results_are_those_of_plain_torch(width, dtype, activation) -> None:
    gate, up, dh = (guarded(5, width, dtype) for _ in range(3))
    ours = (
        native.gated(gate, up, activation),
        *native.gated_backward(dh, gate, up, activation),
    )
    right = (
        plain._gated(gate, up, activation),
        *plain._gated_backward(dh, gate, up, activation),
    )
    for one, other in zip(ours, right, strict=True):
        assert one.is_contiguous() and one.dtype == dtype
        assert error(one, other.double()) < max(torch.finfo(dtype).eps / 8, 2e-6)
        torch.testing.assert_close(one, other)
