"""Products with matrices in the code book E8P against float64."""

import pytest
import torch
from samples import error
from torch.utils.checkpoint import checkpoint

from qtune_kernels.e8p import e8p_dequantize, e8p_linear, e8p_linear_dx
from qtune_kernels.e8p_book import STEP, decode_words

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.0317


def matrix(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored words, their scale and the weights [O, I] in float64."""
    words = torch.randint(0, 1 << 16, (shape[0] * shape[1] // 8,), dtype=torch.int32)
    scale = torch.tensor([SCALE])
    weights = (decode_words(words).double() * STEP * scale.double()).view(shape)
    packed = torch.stack([words & 0xFF, words >> 8], 1).to(torch.uint8).view(-1)
    return packed, scale, weights


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8), (33, 200), (128, 576)])
def test_weights_are_rounded_once(shape, dtype) -> None:
    packed, scale, exact = matrix(shape)
    weights = e8p_dequantize(packed, scale, *shape, dtype)
    # products of a small whole number and a float32 are nearly exact in that
    expected = exact.float().to(dtype) if dtype != torch.float64 else exact
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_as_exact_as_those_of_torch(dtype) -> None:
    packed, scale, exact = matrix((33, 200))
    x = torch.randn(2, 5, 200, dtype=dtype, requires_grad=True)
    y = e8p_linear(x, packed, scale, 33)
    dy = torch.randn_like(y)
    y.backward(dy)
    dense = exact.to(dtype)
    pairs = [
        (y, x @ dense.T, x.double() @ exact.T),
        (x.grad, dy @ dense, dy.double() @ exact),
    ]
    for ours, plain, truth in pairs:
        assert ours.dtype == dtype
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-7


def test_gradients_agree_with_differences() -> None:
    packed, scale, _ = matrix((5, 16))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: e8p_linear(x, packed, scale, 5), (x,))


def test_only_words_are_saved_for_the_backward() -> None:
    packed, scale, _ = matrix((64, 256))
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        e8p_linear(torch.randn(2, 256, requires_grad=True), packed, scale, 64)
    assert saved and sum(tensor.nbytes for tensor in saved) <= 64 * 256 // 4 + 4


def test_checkpointing_gives_the_same_gradient() -> None:
    packed, scale, _ = matrix((33, 200))
    x = torch.randn(4, 200, requires_grad=True)
    e8p_linear(x, packed, scale, 33).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(
        lambda x: e8p_linear(x, packed, scale, 33).square().sum(), x, use_reentrant=False
    ).backward()
    assert torch.equal(x.grad, expected)


def test_the_ops_keep_the_rules_of_torch() -> None:
    packed, scale, _ = matrix((33, 200))
    x = torch.randn(2, 3, 200, requires_grad=True)
    torch.library.opcheck(e8p_dequantize, (packed, scale, 33, 200, torch.bfloat16))
    torch.library.opcheck(e8p_linear, (x, packed, scale, 33))
    torch.library.opcheck(e8p_linear_dx, (torch.randn(3, 33), packed, scale, 200))


def test_no_rows_are_no_trouble() -> None:
    packed, scale, _ = matrix((33, 200))
    assert e8p_linear(torch.empty(0, 200), packed, scale, 33).shape == (0, 33)
