"""AMX registers: one product, and the transposition that arranges its right factor."""

import pytest
import torch

from qtune_kernels.cpu import jit, tiles
from qtune_kernels.cpu.jit import KernelCode, Pointer, kernel
from qtune_kernels.cpu.simd import I32, vector


@kernel
def _product(code: KernelCode, out: Pointer, left: Pointer, right: Pointer) -> None:
    row = code.integer(tiles.ROW_BYTES)
    tiles.configure(code)
    tiles.load(code, 0, out, row)
    tiles.load(code, 1, left, row)
    tiles.load_passing(code, 2, right, row)
    tiles.multiply(code, 0, 1, 2)
    tiles.store(code, 0, out, row)
    tiles.zero(code, 0)
    tiles.store(code, 0, left, row)
    tiles.release(code)


@pytest.mark.skipif(not tiles.available(), reason="no AMX")
def test_a_product_is_added_to_the_sums() -> None:
    left, right = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    sums = torch.randn(16, 16)
    truth = sums.double() + left.double() @ right.double()
    pairs = right.view(16, 2, 16).transpose(1, 2).contiguous()
    _product(sums.data_ptr(), left.data_ptr(), pairs.data_ptr())
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=1e-5)
    assert not left.any()


@kernel
def _transpose(code: KernelCode, matrix: Pointer) -> None:
    rows = [code.load(matrix + 64 * i, vector(I32)) for i in range(16)]
    for i, row in enumerate(tiles.transpose(rows)):
        code.store(row, matrix + 64 * i)


@pytest.mark.skipif(not jit.available(), reason="no kernels for this processor")
def test_rows_and_columns_change_places() -> None:
    matrix = torch.arange(256, dtype=torch.int32).view(16, 16)
    found = matrix.clone()
    _transpose(found.data_ptr())
    assert torch.equal(found, matrix.T)


def test_another_system_has_no_registers(monkeypatch) -> None:
    monkeypatch.setattr(tiles.platform, "system", lambda: "Darwin")
    assert not tiles.available.__wrapped__()
