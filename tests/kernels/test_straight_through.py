"""Gradients of an adapter inside rounded weights, against autograd in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtune_kernels.straight_through import adapter_gradients, straight_through

SCALING = 1.5
# rows, in and out features, rank; the last two are for the kernel of processors with AMX
SIZES = [(7, 100, 13, 3), (33, 64, 96, 16), (40, 192, 64, 32)]


def leaves(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, the rounded weight, A, B and dy."""
    torch.manual_seed(0)
    rows, in_features, out_features, rank = size
    x = torch.randn(2, rows, in_features, dtype=dtype, requires_grad=True)
    weight = torch.randn(out_features, in_features, dtype=dtype)
    a, b = torch.randn(rank, in_features), torch.randn(out_features, rank)
    dy = torch.randn(2, rows, out_features, dtype=dtype)
    return x, weight, a.requires_grad_(), b.requires_grad_(), dy


def expected(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    """Gradients where W + s B A is a dense weight whose rounding passes its gradient."""
    x, a, b = (leaf.detach().double().requires_grad_() for leaf in (x, a, b))
    change = SCALING * b @ a
    rounded = change + (weight.double() - change).detach()
    y = x @ rounded.T
    return list(torch.autograd.grad(y, [x, a, b], dy.double()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"]
)
def test_gradients_are_those_of_a_dense_rounded_weight(
    size: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, a, b, dy = leaves(size, dtype)
    y = straight_through(x @ weight.T, x, a, b, SCALING)
    found = torch.autograd.grad(y, [x, a, b], dy)
    for ours, exact in zip(found, expected(x, weight, a, b, dy), strict=True):
        assert (ours.double() - exact).norm() < tolerance * exact.norm()
    assert found[1].dtype == found[2].dtype == torch.float32


def test_the_product_is_passed_on_as_it_is() -> None:
    x, weight, a, b, _ = leaves(SIZES[0], torch.float32)
    y = x @ weight.T
    assert torch.equal(straight_through(y, x, a, b, SCALING), y)


def test_an_adapter_learns_where_inputs_need_no_gradient() -> None:
    x, weight, a, b, dy = leaves(SIZES[0], torch.float32)
    y = straight_through(x.detach() @ weight.T, x.detach(), a, b, SCALING)
    found = torch.autograd.grad(y, [a, b], dy)
    for ours, exact in zip(found, expected(x, weight, a, b, dy)[1:], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_recomputing_gives_the_same_bits() -> None:
    x, weight, a, b, dy = leaves(SIZES[1], torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        return straight_through(x @ weight.T, x, a, b, SCALING)

    plain = torch.autograd.grad(layer(x), [x, a, b], dy)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), [x, a, b], dy)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_the_op_is_sound() -> None:
    x, _, a, b, dy = leaves(SIZES[0], torch.float32)
    torch.library.opcheck(adapter_gradients, (dy, x.detach(), a.detach(), b.detach(), SCALING))
