"""The transform of rows against a product with the dense matrix in float64."""

import math

import pytest
import torch
from samples import error
from torch import Tensor

from qtune_kernels.cpu.hadamard import hadamard, transforms
from qtune_kernels.cpu.jit import available
from qtune_kernels.hadamard_matrices import kronecker, orders, signs

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

# of the result to bf16, and of float32 sums
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}
# blocks of 16; fewer neighbours than a register has lanes; a factor wider than sums are made at a
# time; several dense factors; more factors of 2 than are done together
WIDTHS = [16, 80, 192, 576, 448, 2048]


def dense(width: int, seed: int) -> Tensor:
    """R, float64 [width, width]."""
    num_blocks, factors = orders(width)
    matrix = torch.block_diag(*[kronecker(factors).double()] * num_blocks)
    return signs(width, seed).double()[:, None] * matrix / math.sqrt(width // num_blocks)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_times_the_matrix(width, dtype, transposed) -> None:
    matrix = dense(width, 5)
    for num_rows in (1, 16, 37):
        x = torch.randn(num_rows, width).to(dtype)
        truth = x.double() @ (matrix.T if transposed else matrix)
        found = hadamard(x, transposed, 5)
        assert found.dtype == dtype and error(found, truth) < ROUNDING[dtype]


def test_rows_that_lie_apart_in_any_number_of_dimensions() -> None:
    around = torch.full((2, 9, 160), torch.nan)
    x = around[:, 1:-1, 32:96].copy_(torch.randn(2, 7, 64))
    truth = x.double() @ dense(64, 0)
    assert error(hadamard(x, False, 0), truth) < ROUNDING[torch.float32]
    assert error(hadamard(x[0, 0], False, 0), truth[0, 0]) < ROUNDING[torch.float32]
    across = torch.randn(64, 21).T
    assert error(hadamard(across, False, 0), across.double() @ dense(64, 0)) < 1e-6


def test_threads_share_the_rows() -> None:
    x, before = torch.randn(50, 192), torch.get_num_threads()
    alone = hadamard(x, False, 1)
    torch.set_num_threads(3)
    together = hadamard(x, False, 1)
    torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_what_is_taken() -> None:
    assert transforms(torch.empty(3, 48)) and transforms(torch.empty(48, dtype=torch.bfloat16))
    assert not transforms(torch.empty(3, 40)) and not transforms(torch.empty(0, 48))
    assert not transforms(torch.empty(3, 48, dtype=torch.float16))
    assert not transforms(torch.empty(3, 48, device="meta"))
