"""RMSNorm against float64 and against transformers, natively and in plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from samples import error
from torch._subclasses.fake_tensor import FakeTensorMode

from qtune_kernels.cpu import rowwise
from qtune_kernels.norm import add_rms_norm, rms_norm, rms_norm_dx

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (2, 3, 64), (2, 100), (5, 576)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(rowwise, "available", lambda: False)
    elif not rowwise.available():
        pytest.skip("no kernels for this processor")
    return str(request.param)


def truth(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    mean = x.double().square().mean(-1, keepdim=True)
    return x.double() / (mean + EPS).sqrt() * (weight.double() + offset)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, a residual and the gradients of y and of the sum, then a weight."""
    wide = [torch.randn(shape) for _ in range(4)]
    return [tensor.to(dtype) for tensor in (*wide, torch.randn(shape[-1]))]


def gradients(
    run: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(run(*inputs), inputs, dy)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_float64(shape, dtype, offset) -> None:
    x, _, dy, _, weight = operands(shape, dtype)
    limit = 4 * torch.finfo(dtype).eps
    assert error(rms_norm(x, weight, EPS, offset), truth(x, weight, offset)) < limit
    ours = gradients(lambda x, w: rms_norm(x, w, EPS, offset), [x, weight], dy)
    exact = gradients(lambda x, w: truth(x, w, offset), [x.double(), weight.double()], dy.double())
    # the gradient of a single element all but vanishes
    floor = 1e-3 if shape == (1, 1) else 0.0
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert float((one.double() - other).norm()) <= limit * float(other.norm()) + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(shape, dtype) -> None:
    x, residual, dy, dsum, weight = operands(shape, dtype)
    y, total = add_rms_norm(x, residual, weight, EPS, 1.0)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS, 1.0))
    inputs = [x.requires_grad_(), residual.requires_grad_()]
    dx, dresidual = torch.autograd.grad(add_rms_norm(*inputs, weight, EPS, 1.0), inputs, (dy, dsum))
    exact = gradients(lambda x: truth(x, weight, 1.0), [total.double()], dy.double())[0]
    assert torch.equal(dx, dresidual)
    assert error(dx, exact + dsum.double()) < 4 * torch.finfo(dtype).eps


def test_either_result_of_the_sum_may_go_unused() -> None:
    x, residual, dy, _, weight = operands((3, 40), torch.float32)
    x.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, EPS, 0.0)
    from_sum = torch.autograd.grad(total, x, dy, retain_graph=True)[0]
    torch.testing.assert_close(from_sum, dy)
    exact = gradients(lambda x: truth(x, weight, 0.0), [(x + residual).double()], dy.double())[0]
    assert error(torch.autograd.grad(y, x, dy)[0], exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_transformers_rounds_in_the_same_places(family, dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, *_, weight = operands((64, 96), dtype)
    norm = (LlamaRMSNorm if family == "llama" else GemmaRMSNorm)(96, EPS)
    norm.weight.data = weight
    ours = rms_norm(x, weight, EPS, 0.0 if family == "llama" else 1.0)
    # a sum taken in another order moves a few results over the border between two numbers
    different = (ours != norm(x)).float().mean()
    assert error(ours, norm(x).double()) < 1e-7 or different < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_of_operands_are_free(dtype) -> None:
    x, dy = (torch.randn(2, 64, 5).to(dtype).transpose(1, 2) for _ in range(2))
    weight = torch.randn(128).to(dtype)[::2]
    dense = x.contiguous(), weight.contiguous()
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm(*dense, EPS))
    results = rms_norm(x, weight, EPS), *add_rms_norm(x, dy, weight, EPS)
    for one in (*results, rms_norm_dx(dy, x, weight, EPS, 0.0, dy)):
        assert one.is_contiguous()
    apart = torch.randn(10, 80).to(dtype)[:, :64]
    once = dy.sum((0, 1)).expand(10, 64)
    torch.testing.assert_close(
        rms_norm_dx(once, apart, weight, EPS, 0.0, None),
        rms_norm_dx(once.contiguous(), apart.contiguous(), dense[1], EPS, 0.0, None),
    )


def test_a_weight_of_another_dtype_keeps_that_of_x() -> None:
    x, *_ = operands((3, 40), torch.bfloat16)
    weight = torch.randn(40)
    assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
    assert error(rms_norm(x, weight, EPS), truth(x, weight, 0.0)) < 0.01


def test_no_rows_are_rows_too() -> None:
    assert rms_norm(torch.randn(0, 40), torch.randn(40), EPS).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_room_changes_nothing_on_the_cpu(dtype) -> None:
    x, residual, dy, dsum, weight = operands((2, 3, 40), dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    results = []
    for room in (0, 8):
        y = rms_norm(x, weight, EPS, 1.0, room)
        other, total = add_rms_norm(*inputs, EPS, 1.0, room)
        assert y.is_contiguous() and other.is_contiguous()
        dx, dw = torch.autograd.grad(y, [x, weight], dy)
        both = torch.autograd.grad([other, total], inputs, [dy, dsum])
        results.append([y, other, total, dx, dw, *both])
    for one, right in zip(*results, strict=True):
        assert torch.equal(one, right)


def test_on_cuda_the_shape_functions_count_the_room() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 40, dtype=torch.bfloat16, device="cuda")
        weight = x.new_empty(40)
        y, total = add_rms_norm(x, x, weight, EPS, 0.0, 8)
        assert rms_norm(x, weight, EPS, 0.0, 8).stride() == y.stride() == (144, 48, 1)
        assert rms_norm(x, weight, EPS, 0.0).stride() == total.stride() == (120, 40, 1)


def test_the_ops_keep_the_rules_of_torch() -> None:
    x, residual, dy, dsum, weight = operands((3, 40), torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    for room in (0, 8):
        torch.library.opcheck(rms_norm, (x, weight, EPS, 0.0, room))
        torch.library.opcheck(add_rms_norm, (x, residual, weight, EPS, 1.0, room))
    for added in (None, dsum):
        torch.library.opcheck(rms_norm_dx, (dy, x.detach(), weight.detach(), EPS, 0.0, added))
