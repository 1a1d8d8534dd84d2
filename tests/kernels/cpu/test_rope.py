"""RoPE's CPU kernel against the plain version: strides, odd sizes, guards."""

import pytest
import torch

from qtune_kernels import rope as plain
from qtune_kernels.cpu import rope as native
from qtune_kernels.cpu.jit import available

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (20, 20), (40, 12), (70, 34)])
def test_results_are_those_of_plain_torch(size, rotated, dtype, batch, inverse) -> None:
    around = torch.full((2, 5, 4, size + 16), torch.nan, dtype=dtype)
    x = around[:, :, :3, :size].copy_(torch.randn(2, 5, 3, size)).transpose(1, 2)
    cos, sin = (torch.randn(batch, 5, rotated).to(dtype) for _ in range(2))
    y, right = native.rope(x, cos, sin, inverse), plain._rope(x, cos, sin, inverse)
    assert y.stride() == right.stride() and y.dtype == dtype
    torch.testing.assert_close(y, right)


def test_angles_may_have_another_dtype() -> None:
    x = torch.randn(1, 2, 5, 32).bfloat16()
    cos, sin = (torch.randn(1, 5, 32) for _ in range(2))
    y, right = native.rope(x, cos, sin, False), plain._rope(x, cos, sin, False)
    torch.testing.assert_close(y, right)
