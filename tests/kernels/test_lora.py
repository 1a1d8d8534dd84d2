from typing import Any

import pytest
import torch
from samples import COUNTED, NF4, Sample, Variant, error, sample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtune_kernels.lora import (
    dense_lora_linear,
    lora_linear,
    lora_linear_backward,
    lora_linear_forward,
)
from qtune_kernels.rows import with_room

BITS = pytest.mark.parametrize("levels", [NF4, ()], ids=["4 bits", "8 bits"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (33, 192)
RANK, SCALING = 4, 1.5
CPU = torch.device("cpu")


def leaf(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def adapter(made: Sample, rank: int = RANK, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A [R, I] and B [O, R]."""
    device = made.packed.device
    (out_features, in_features) = made.weights.shape
    a, b = leaf(rank, in_features, device=device), leaf(out_features, rank, device=device)
    a.data /= in_features**0.5
    return [a.detach().to(dtype).requires_grad_(), b.detach().to(dtype).requires_grad_()]


def arguments(made: Sample, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple:
    weight = (made.packed, *made.scales, list(made.levels), made.group_size)
    return (x, *weight, made.weights.shape[0], bias, a, b, SCALING)


def forward(made: Sample, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return lora_linear(*arguments(made, x, bias, a, b))


def truth_and_stock(made: Sample, dy: Tensor, leaves: list[Tensor]) -> list[list[Tensor]]:
    """y and the gradients of x, bias, A and B: in float64, and in plain PyTorch and x's dtype."""
    results = []
    for dtype in (torch.float64, leaves[0].dtype):
        x, bias, a, b = (t.detach().to(dtype).requires_grad_() for t in leaves)
        y = torch.nn.functional.linear(x, made.weights.to(dtype), bias)
        y = y + (x @ a.T) @ b.T * SCALING
        y.backward(dy.to(dtype))
        results.append([y.detach(), x.grad, bias.grad, a.grad, b.grad])
    return results


def expect_as_exact_as_torch(made: Sample, leaves: list[Tensor], y: Tensor, dy: Tensor) -> None:
    truths, plain = truth_and_stock(made, dy, leaves)
    for ours, stock, truth in zip([y, *(t.grad for t in leaves)], plain, truths, strict=True):
        assert ours.shape == truth.shape
        assert error(ours, truth) <= 2 * error(stock, truth) + 1e-6


@BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (7, 130), (1, 64), (64, 192)], ids=str)
def test_outputs_and_gradients_are_as_exact_as_those_of_torch(shape, dtype, levels) -> None:
    made = sample(shape, levels)
    leaves = [leaf(2, 5, shape[1], dtype=dtype), leaf(shape[0], dtype=dtype), *adapter(made)]
    y = forward(made, *leaves)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert [y.dtype, *(t.grad.dtype for t in leaves)] == [dtype] * 3 + [torch.float32] * 2
    expect_as_exact_as_torch(made, leaves, y, dy)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("name", "variant", "shape", "group_size"),
    [
        ("int4", Variant("linear", "codes"), (64, 128), 64),
        ("int3", Variant("half", "half"), (64, 128), 32),
        ("int2_sym", Variant("linear"), (7, 100), 100),
    ],
)
def test_all_kinds_of_weights_multiply(name, variant, shape, group_size, dtype) -> None:
    made = sample(shape, COUNTED[name], group_size, variant=variant)
    leaves = [leaf(40, shape[1], dtype=dtype), leaf(shape[0], dtype=dtype), *adapter(made)]
    y = forward(made, *leaves)
    dy = torch.randn_like(y)
    y.backward(dy)
    expect_as_exact_as_torch(made, leaves, y, dy)


def test_gradients_agree_with_differences() -> None:
    made = sample((5, 64), COUNTED["int4"], variant=Variant("linear", "codes"))
    leaves = [leaf(3, 64, dtype=torch.float64), leaf(5, dtype=torch.float64)]
    leaves += adapter(made, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: forward(made, *leaves), leaves)


def test_without_a_bias() -> None:
    made = sample(SHAPE)
    x, (a, b) = torch.randn(4, 192), adapter(made)
    right = x.double() @ (made.weights + SCALING * b.double() @ a.double()).T
    assert error(forward(made, x, None, a, b), right) < 1e-6


def test_an_adapter_of_16_bits_gets_gradients_of_16_bits() -> None:
    made = sample(SHAPE)
    a, b = adapter(made, dtype=torch.bfloat16)
    forward(made, torch.randn(4, 192).bfloat16(), None, a, b).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16


def test_a_first_layer_asks_for_no_gradient_of_x() -> None:
    made = sample(SHAPE)
    a, b = adapter(made)
    x, dy = torch.randn(4, 192), torch.randn(4, 33)
    forward(made, x, None, a, b).backward(dy)
    alone = a.grad, b.grad
    a.grad = b.grad = None
    x.requires_grad_()
    forward(made, x, None, a, b).backward(dy)
    assert torch.equal(a.grad, alone[0]) and torch.equal(b.grad, alone[1])
    saved = (made.packed, *made.scales, list(NF4), 64)
    u = x.detach() @ a.detach().T
    dx, *_ = lora_linear_backward(dy, x.detach(), u, *saved, a.detach(), b.detach(), SCALING, False)
    assert dx.shape == (0,)


def test_only_x_codes_and_the_narrow_product_are_saved() -> None:
    made = sample((64, 256))
    x, (a, b) = leaf(3, 256), adapter(made)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        forward(made, x, None, a, b)
    assert len(saved) == 8
    expected = [x, a, b, made.packed, *made.scales[:3]]
    assert {t.data_ptr() for t in expected} <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in expected) + 3 * RANK * 4


def test_the_narrow_product_has_no_gradient() -> None:
    made = sample(SHAPE)
    y, u = lora_linear_forward(*arguments(made, leaf(2, 192), None, *adapter(made)))
    assert y.requires_grad and not u.requires_grad


def test_a_dense_weight_gives_the_same_bits() -> None:
    made = sample(SHAPE)
    bias = torch.randn(33).bfloat16()
    x, (a, b) = torch.randn(2, 3, 192).bfloat16(), adapter(made)
    dense = dense_lora_linear(x, made.weights.bfloat16(), bias, a, b, SCALING)
    assert torch.equal(dense, forward(made, x, bias, a, b))


def test_rows_with_room_give_the_same_and_keep_their_values() -> None:
    made = sample(SHAPE)
    x, (a, b) = torch.randn(4, 192), adapter(made, 8)
    roomy = with_room(4, 192, torch.float32, CPU, 8).copy_(x)
    torch.testing.assert_close(forward(made, roomy, None, a, b), forward(made, x, None, a, b))
    assert torch.equal(roomy, x)


def test_checkpointing_gives_the_same_gradient() -> None:
    made = sample(SHAPE)
    x, (a, b) = leaf(4, 192), adapter(made)

    def loss(x: Tensor) -> Tensor:
        return forward(made, x, None, a, b).square().sum()

    loss(x).backward()
    expected = [t.grad for t in (x, a, b)]
    x.grad = a.grad = b.grad = None
    checkpoint(loss, x, use_reentrant=False).backward()
    for found, right in zip((x.grad, a.grad, b.grad), expected, strict=True):
        assert torch.equal(found, right)


def test_torch_compile_takes_the_op_as_it_is() -> None:
    made = sample(SHAPE)
    x, (a, b) = leaf(4, 192), adapter(made)

    def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (forward(made, x, None, a, b) * 2).square().sum()

    loss(x, a, b).backward()
    expected = [t.grad for t in (x, a, b)]
    x.grad = a.grad = b.grad = None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, a, b).backward()
    for found, right in zip((x.grad, a.grad, b.grad), expected, strict=True):
        assert torch.equal(found, right)


def test_meta_tensors_have_the_same_shapes() -> None:
    made = sample((6, 100)).to(torch.device("meta"))
    x = torch.empty(2, 3, 100, dtype=torch.bfloat16, device="meta", requires_grad=True)
    a, b = adapter(made)
    y, u = lora_linear_forward(*arguments(made, x, None, a, b))
    assert y.shape == (2, 3, 6) and u.shape == (6, RANK)
    assert y.dtype == u.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape and a.grad.shape == a.shape and b.grad.dtype == torch.float32


@BITS
@pytest.mark.parametrize("needs_dx", [True, False])
# the second is multiplied by the CPU's own kernels, where it has them
@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPE, torch.float32), ((64, 192), torch.bfloat16)], ids=str
)
def test_the_ops_keep_the_rules_of_torch(shape, dtype, needs_dx: bool, levels) -> None:
    made = sample(shape, levels)
    a, b = adapter(made)
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    torch.library.opcheck(lora_linear_forward, arguments(made, x, None, a, b))
    bias = leaf(shape[0], dtype=dtype)
    torch.library.opcheck(lora_linear_forward, arguments(made, x.requires_grad_(), bias, a, b))
    dy, u = torch.randn(2, 3, shape[0], dtype=dtype), torch.randn(6, RANK, dtype=dtype)
    x = x.detach()
    weight = (made.packed, *made.scales, list(levels), 64)
    rest = (a.detach(), b.detach(), SCALING, needs_dx)
    torch.library.opcheck(lora_linear_backward, (dy, x, u, *weight, *rest))


@pytest.mark.parametrize("shape", [(192,), (0, 192), (2, 0, 192)], ids=str)
def test_odd_leading_dimensions(shape: tuple[int, ...]) -> None:
    made = sample(SHAPE)
    x, (a, b) = leaf(*shape), adapter(made)
    y = forward(made, x, None, a, b)
    assert y.shape == (*shape[:-1], 33)
    y.sum().backward()
    assert x.grad.shape == shape and a.grad.shape == a.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64, 250, 300])
@pytest.mark.parametrize("rank", [4, 16])
def test_cuda_results_are_as_exact_as_those_of_torch(rank, num_rows, dtype, levels) -> None:
    device = torch.device("cuda")
    made = sample((389, 1152), levels).to(device)
    roomy = with_room(num_rows, 1152, dtype, device)
    roomy.copy_(torch.randn(num_rows, 1152, device=device))
    for x in (roomy.clone(), roomy):
        bias = leaf(389, dtype=dtype, device=device)
        leaves = [x.detach().requires_grad_(), bias, *adapter(made, rank)]
        y = forward(made, *leaves)
        dy = with_room(*y.shape, dtype, device).copy_(torch.randn_like(y))
        y.backward(dy)
        expect_as_exact_as_torch(made, leaves, y, dy)
