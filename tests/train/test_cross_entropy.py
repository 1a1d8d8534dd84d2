"""The summed cross entropy and its gradient against torch in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from qtune.train.cross_entropy import ROWS, summed_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARY = 301


def sample(num_rows: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, VOCABULARY, generator=generator) * spread
    targets = torch.randint(VOCABULARY, (num_rows,), generator=generator)
    return logits.to(dtype).requires_grad_(), targets


def expected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.detach().double().requires_grad_()
    loss = cross_entropy(exact, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, exact)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5])
def test_against_float64(num_rows: int, dtype: torch.dtype) -> None:
    logits, targets = sample(num_rows, dtype)
    loss, gradient = expected(logits, targets)
    found = summed_cross_entropy(logits, targets)
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found.detach()) == pytest.approx(float(loss), rel=1e-6)
    found.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    # one rounding to the dtype of the logits
    torch.testing.assert_close(logits.grad, gradient.to(dtype), atol=1e-6, rtol=0.01)
    rounded = (gradient.to(dtype).double() - gradient).norm()
    assert (logits.grad.double() - gradient).norm() <= 2 * rounded + 1e-6 * gradient.norm()


def test_scaled_gradient() -> None:
    logits, targets = sample(20, torch.float32)
    _, gradient = expected(logits, targets)
    (summed_cross_entropy(logits, targets) * 0.125).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), gradient * 0.125, atol=1e-7, rtol=1e-5)


def test_gradient_through_a_matrix() -> None:
    hidden = torch.randn(5, 8, dtype=torch.float32, requires_grad=True)
    head = torch.randn(VOCABULARY, 8)
    _, targets = sample(5, torch.float32)
    summed_cross_entropy(hidden @ head.T, targets).backward()
    exact = hidden.detach().double().requires_grad_()
    cross_entropy(exact @ head.double().T, targets, reduction="sum").backward()
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4, 6e4])
def test_extreme_logits(size: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, VOCABULARY, dtype=dtype)
    logits[:, 7] = size
    logits[1:, 8] = -size
    logits[2] = size
    logits.requires_grad_()
    targets = torch.tensor([7, 7, 100, 8])
    loss, gradient = expected(logits, targets)
    found = summed_cross_entropy(logits, targets)
    found.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert float(found.detach()) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-6, rtol=0.01)


def test_infinite_logits_of_forbidden_tokens() -> None:
    logits, targets = sample(3, torch.float32)
    with torch.no_grad():
        logits[:, 0] = -torch.inf
    targets[:] = torch.tensor([1, 2, 3])
    loss, gradient = expected(logits, targets)
    found = summed_cross_entropy(logits, targets)
    found.backward()
    assert logits.grad is not None
    assert float(found.detach()) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-6, rtol=1e-5)


def test_nan_is_not_hidden() -> None:
    logits, targets = sample(3, torch.float32)
    with torch.no_grad():
        logits[1, 5] = torch.nan
    assert summed_cross_entropy(logits, targets).isnan()


def test_no_rows() -> None:
    logits = torch.empty(0, VOCABULARY, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and logits.grad.shape == (0, 301)


def test_without_gradient() -> None:
    logits, targets = sample(20, torch.bfloat16)
    loss, _ = expected(logits, targets)
    with torch.no_grad():
        found = summed_cross_entropy(logits, targets)
    assert not found.requires_grad
    assert float(found) == pytest.approx(float(loss), rel=1e-6)


def test_keeps_one_matrix_of_the_logits_dtype() -> None:
    logits, targets = sample(100, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_cross_entropy(logits, targets)
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [(logits.shape, torch.bfloat16)]


def test_on_meta() -> None:
    logits = torch.empty(20, VOCABULARY, device="meta", requires_grad=True)
    loss = summed_cross_entropy(logits, torch.empty(20, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.is_meta and logits.grad is not None
