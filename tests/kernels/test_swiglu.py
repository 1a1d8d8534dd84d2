"""The gated activation against float64, natively and in plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from samples import error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import gelu, silu

from qtune_kernels.cpu import rowwise
from qtune_kernels.swiglu import ACTIVATIONS, gated, gated_backward

SHAPES = [(1,), (3, 7), (2, 3, 64), (2, 100), (5, 1536)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# of float32 computations: where the activation is nearly linear, its slope loses a few digits
ROUNDING = 2e-6
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True, params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(rowwise, "available", lambda: False)
    elif not rowwise.available():
        pytest.skip("no kernels for this processor")
    return str(request.param)


def truth(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    act = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    return act * up


def gradients(
    run: Callable[..., torch.Tensor],
    gate: torch.Tensor,
    up: torch.Tensor,
    dh: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """h and the gradients of gate and up."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (gate, up)]
    h = run(*inputs, activation)
    return h, *torch.autograd.grad(h, inputs, dh)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_float64(shape, dtype, activation) -> None:
    gate, up, dh = ((3 * torch.randn(shape)).to(dtype) for _ in range(3))
    exact = gradients(truth, gate.double(), up.double(), dh.double(), activation)
    plain = gradients(truth, gate, up, dh, activation)
    ours = gradients(gated, gate, up, dh, activation)
    for one, other, right in zip(ours, plain, exact, strict=True):
        assert one.dtype == dtype
        assert error(one, right) <= 2 * error(other, right) + ROUNDING


@EVERY
def test_far_from_zero_it_is_zero_or_the_product(activation) -> None:
    gate = torch.tensor([-1e4, -200.0, -88.0, 88.0, 200.0, 1e4])
    up, dh = torch.full_like(gate, 2.0), torch.ones_like(gate)
    h = torch.tensor([0, 0, 0, 176, 400, 2e4])
    dgate = torch.tensor([0, 0, 0, 2.0, 2.0, 2.0])
    torch.testing.assert_close(gated(gate, up, activation), h, atol=1e-30, rtol=1e-6)
    found, dup = gated_backward(dh, gate, up, activation)
    torch.testing.assert_close(found, dgate, atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(dup, h / 2, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_halves_of_one_product_are_read_in_place(dtype) -> None:
    gate, up = torch.randn(2, 5, 2 * 72).to(dtype).chunk(2, -1)
    whole = gated(gate.clone(), up.clone(), "silu")
    torch.testing.assert_close(gated(gate, up, "silu"), whole)
    ones = torch.ones(1, dtype=dtype).expand(2, 5, 72)
    results = gated_backward(ones, gate, up, "silu")
    for one, other in zip(
        results, gated_backward(ones.clone(), gate.clone(), up.clone(), "silu"), strict=True
    ):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh"):
        gated(torch.randn(3), torch.randn(3), "relu")


@EVERY
def test_room_changes_nothing_on_the_cpu(activation) -> None:
    gate, up, dh = (torch.randn(2, 3, 40).bfloat16() for _ in range(3))
    plain = gradients(gated, gate, up, dh, activation)
    roomy = gradients(lambda *inputs: gated(*inputs, 8), gate, up, dh, activation)
    for one, other in zip(roomy, plain, strict=True):
        assert one.is_contiguous() and torch.equal(one, other)


def test_on_cuda_the_shape_functions_count_the_room() -> None:
    with FakeTensorMode():
        gate = torch.empty(2, 3, 40, dtype=torch.bfloat16, device="cuda")
        for room, strides in ((0, (120, 40, 1)), (8, (144, 48, 1))):
            results = (
                gated(gate, gate, "silu", room),
                *gated_backward(gate, gate, gate, "silu", room),
            )
            assert [one.stride() for one in results] == [strides] * 3


@EVERY
def test_the_ops_keep_the_rules_of_torch(activation) -> None:
    gate, up = (torch.randn(3, 40).bfloat16().requires_grad_() for _ in range(2))
    operands = gate.detach(), gate.detach(), up.detach()
    for room in (0, 8):
        torch.library.opcheck(gated, (gate, up, activation, room))
        torch.library.opcheck(gated_backward, (*operands, activation, room))
