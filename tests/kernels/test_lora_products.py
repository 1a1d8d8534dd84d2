"""Both ways of adding the adapter's part, against float64."""

from typing import NamedTuple

import pytest
import torch
from samples import NF4, error, sample
from torch import Tensor

from qtune_kernels import lora_products as products
from qtune_kernels.lora_products import Weight
from qtune_kernels.rows import with_room

CPU = torch.device("cpu")
OUT, IN, RANK, SCALING = 33, 192, 8, 1.5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    x: Tensor
    dy: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    weight: Weight
    weights: Tensor


def case(dtype: torch.dtype, levels=NF4) -> Case:
    """A layer whose adapter is a quarter of it."""
    made = sample((OUT, IN), levels, largest=0.3)
    weight = Weight(made.packed, made.scales, made.levels, made.group_size, (OUT, IN))
    x, dy = torch.randn(45, IN).to(dtype), torch.randn(45, OUT).to(dtype)
    a, b = torch.randn(RANK, IN) / IN**0.5, torch.randn(OUT, RANK) / 10
    return Case(x, dy, torch.randn(OUT).to(dtype), a, b, weight, made.weights)


def roomy(rows: Tensor, room: int = RANK) -> Tensor:
    """The same rows with room behind them, which is NaN."""
    new = with_room(*rows.shape, rows.dtype, CPU, room)
    torch.as_strided(new, (len(rows), new.stride(0)), new.stride()).fill_(torch.nan)
    return new.copy_(rows)


def truths(made: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dA and dB in float64."""
    x, a, b = (t.double().requires_grad_() for t in (made.x, made.a, made.b))
    y = x @ made.weights.T + made.bias.double() + SCALING * (x @ a.T) @ b.T
    y.backward(made.dy.double())
    return y.detach(), x.grad, a.grad, b.grad


def stock(made: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain PyTorch and the dtype of x, dA and dB included."""
    dtype = made.x.dtype
    x, a, b = (t.detach().to(dtype).requires_grad_() for t in (made.x, made.a, made.b))
    y = torch.nn.functional.linear(x, made.weights.to(dtype), made.bias)
    y = y + (x @ a.T) @ b.T * SCALING
    y.backward(made.dy)
    return y.detach(), x.grad, a.grad, b.grad


def found(made: Case, *, with_rooms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dy, bias, a, b, weight, _ = made
    dense = made.weights.to(x.dtype)
    if with_rooms:
        y, u = products.forward_extended(roomy(x), weight, bias, a, b, SCALING)
    else:
        y, u = products.forward(x, dense, bias, a, b, SCALING)
    v = products.rank_gradient(dy, b, SCALING)
    if with_rooms:
        dx = products.input_gradient_extended(roomy(dy), v, weight, a)
    else:
        dx = products.input_gradient(dy, v, dense, a)
    da = products.a_gradient(v, x, a.dtype)
    return y, dx, da, products.b_gradient(dy, u, SCALING, b.dtype)


@pytest.mark.parametrize("with_rooms", [False, True], ids=["added", "extended"])
@pytest.mark.parametrize("levels", [NF4, ()], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_as_exact_as_those_of_torch(dtype, levels, with_rooms) -> None:
    made = case(dtype, levels)
    ours = found(made, with_rooms=with_rooms)
    for mine, plain, truth in zip(ours, stock(made), truths(made), strict=True):
        assert error(mine, truth) <= 2 * error(plain, truth) + 1e-7
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]


def test_the_base_is_rounded_once() -> None:
    """The adapter's part first is more exact than the base's part first."""
    made = case(torch.bfloat16)
    truth = truths(made)[0]
    base_first = torch.nn.functional.linear(made.x, made.weights.bfloat16(), made.bias)
    u = made.x @ made.a.bfloat16().T
    base_first.addmm_(u, made.b.bfloat16().T, alpha=SCALING)
    assert error(found(made, with_rooms=False)[0], truth) < error(base_first, truth)


@pytest.mark.parametrize(
    ("rank", "room", "pays"), [(8, 8, True), (8, 0, False), (4, 8, False), (8, 9, False)]
)
def test_rows_are_extended_where_the_sum_stays_aligned(rank: int, room: int, pays: bool) -> None:
    assert products.extends(roomy(torch.ones(3, 16), room), rank) == pays
    assert not products.extends(torch.ones(3, 16), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_rounds_once(dtype: torch.dtype) -> None:
    b = torch.randn(64, 8)
    exact = (b.double() / 3).to(dtype)
    torch.testing.assert_close(products.scaled(b, 1 / 3, dtype), exact, atol=0, rtol=1e-6)
    half = products.scaled(b.bfloat16(), 1 / 3, torch.float32)
    assert error(half, b.bfloat16().double() / 3) < 1e-6


def test_weights_are_written_between_other_columns() -> None:
    weight, weights = case(torch.float32).weight, case(torch.float32).weights
    buffer = torch.full((OUT, IN + 4), torch.nan)
    weight.dequantize_into(buffer[:, :IN])
    assert error(buffer[:, :IN], weights) < 1e-7
    assert buffer[:, IN:].isnan().all()
