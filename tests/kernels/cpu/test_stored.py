"""What is read of a matrix: 32 neighbours of a row in bf16, zeros outside of a bounded one."""

import pytest
import torch

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.stored import Bounded, Dense

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")


@kernel
def _dense(
    code: KernelCode, out: Pointer, start: Pointer, stride: Integer, row: Integer, column: Integer
) -> None:
    code.store(Dense(code, start, stride).read(row, column), out)


@kernel
def _bounded(
    code: KernelCode,
    out: Pointer,
    start: Pointer,
    rows: Integer,
    columns: Integer,
    factor: Number,
    row: Integer,
    column: Integer,
) -> None:
    code.store(Bounded(code, start, rows, columns, factor).read(row, column), out)


def test_a_dense_matrix_whose_rows_lie_apart() -> None:
    matrix = torch.randn(5, 100).bfloat16()[:, :80]
    out = torch.empty(32, dtype=torch.bfloat16)
    for row, column in ((0, 0), (3, 17), (4, 48)):
        _dense(out.data_ptr(), matrix.data_ptr(), matrix.stride(0) * 2, row, column)
        assert torch.equal(out, matrix[row, column : column + 32])


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (8, 40), (32, 5)])
def test_zeros_lie_outside_of_a_bounded_matrix(shape) -> None:
    # NaN in memory around it must not come in
    around = torch.full((shape[0] * shape[1] + 64,), torch.nan)
    matrix = around[32 : 32 + shape[0] * shape[1]].view(shape).copy_(torch.randn(shape))
    truth = torch.zeros(64, 96)
    truth[: shape[0], : shape[1]] = matrix * 0.5
    for row in (0, shape[0] - 1, shape[0], 40):
        for column in (0, 32, 64):
            out = torch.full((32,), torch.nan, dtype=torch.bfloat16)
            _bounded(out.data_ptr(), matrix.data_ptr(), *shape, 0.5, row, column)
            assert torch.equal(out, truth[row, column : column + 32].bfloat16())
