"""The rotation against its matrix in float64."""

import math

import pytest
import torch
from samples import error
from torch.utils.checkpoint import checkpoint

from qtune_kernels import hadamard as module
from qtune_kernels.hadamard import hadamard
from qtune_kernels.hadamard_matrices import kronecker, orders, signs

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# one, two and three factors, blocks, one block for each number
WIDTHS = [16, 192, 576, 2240, 100, 428, 7]


def matrix(width: int, seed: int = 0) -> torch.Tensor:
    """R in float64."""
    num_blocks, factors = orders(width)
    block = kronecker(factors).double() / math.sqrt(width // num_blocks)
    return torch.diag(signs(width, seed).double()) @ torch.block_diag(*[block] * num_blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_multiplied_by_the_matrix_or_its_transpose(width, dtype) -> None:
    x = torch.randn(2, 5, width).to(dtype)
    exact = matrix(width)
    # one rounding, but for what float32 and float64 sums leave
    bound = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 4)
    for transposed in (False, True):
        y = hadamard(x, transposed)
        assert y.dtype == dtype and y.shape == x.shape
        assert error(y, x.double() @ (exact.T if transposed else exact)) < bound


@pytest.mark.parametrize("width", [1536, 11008, 53248, 13696])
def test_the_transpose_takes_it_back(width) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    y = hadamard(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(y, True), x)


def test_outliers_are_spread() -> None:
    x = torch.zeros(576)
    x[5] = 1.0
    torch.testing.assert_close(hadamard(x).abs(), torch.full((576,), 1 / 24))


def test_seeds_differ_in_signs() -> None:
    x = torch.randn(4, 192, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, seed=3), x @ matrix(192, 3))
    assert not torch.allclose(hadamard(x, seed=3), hadamard(x))


def test_many_rows_are_worked_through_in_chunks(monkeypatch) -> None:
    x = torch.randn(11, 576)
    expected = hadamard(x)
    monkeypatch.setattr(module, "CHUNK", 3 * 576)
    torch.testing.assert_close(hadamard(x), expected)


def test_operands_may_lie_anyhow() -> None:
    x = torch.randn(192, 4)
    torch.testing.assert_close(hadamard(x.T), hadamard(x.T.contiguous()))
    assert hadamard(torch.empty(0, 192)).shape == (0, 192)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_agree_with_differences(transposed) -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, transposed, 1), (x,))


def test_nothing_is_kept_for_the_backward() -> None:
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        hadamard(torch.randn(2, 192, requires_grad=True))
    assert not saved


def test_checkpointing_gives_the_same_gradient() -> None:
    x = torch.randn(2, 192, requires_grad=True)
    hadamard(x).pow(3).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(lambda x: hadamard(x).pow(3).sum(), x, use_reentrant=False).backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_keeps_the_rules_of_torch(transposed) -> None:
    x = torch.randn(2, 3, 192, requires_grad=True)
    torch.library.opcheck(hadamard, (x, transposed, 1))
    assert hadamard(x.to("meta")).shape == x.shape
