"""The gated activation's Triton kernels against float64, guarded and poisoned."""

from collections.abc import Iterator

import pytest
import torch
from samples import error
from torch.nn.functional import gelu, silu

from qtune_kernels.swiglu import ACTIVATIONS, gated, gated_backward

kernels = pytest.importorskip("qtune_kernels.swiglu_triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# of float32 computations: where the activation is nearly linear, its slope loses a few digits
ROUNDING = 2e-6
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)
GUARD = 64


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Every new buffer starts as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns to a program, so that small tensors need several."""
    monkeypatch.setattr(kernels, "BLOCK", 64)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers between NaN, so that a read beyond them shows."""
    values = 3 * torch.randn(shape, device=device)
    around = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    return around[GUARD:-GUARD].view(shape).copy_(values)


def truth(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    act = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    return act * up


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 64), (5, 150)])
def test_results_are_as_exact_as_those_of_torch(shape, dtype, activation, device) -> None:
    gate, up, dh = (guarded(shape, dtype, device) for _ in range(3))
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    plain = [tensor.detach().clone().requires_grad_() for tensor in (gate, up)]
    h, rough = truth(*exact, activation), truth(*plain, activation)
    rights = h, *torch.autograd.grad(h, exact, dh.double())
    roughs = rough, *torch.autograd.grad(rough, plain, dh)
    ours = kernels.gated(gate, up, activation), *kernels.gated_backward(dh, gate, up, activation)
    for one, other, right in zip(ours, roughs, rights, strict=True):
        assert one.shape == shape and one.dtype == dtype
        assert error(one, right) <= 2 * error(other, right) + ROUNDING


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@EVERY
def test_far_from_zero_it_is_zero_or_the_product(activation, device) -> None:
    gate = torch.tensor([-1e4, -200.0, 200.0, 1e4], device=device)
    up, dh = torch.full_like(gate, 2.0), torch.ones_like(gate)
    assert kernels.gated(gate, up, activation).tolist() == [0, 0, 400, 2e4]
    dgate, dup = kernels.gated_backward(dh, gate, up, activation)
    assert dgate.tolist() == [0, 0, 2, 2] and dup.tolist() == [0, 0, 200, 1e4]


def test_rows_may_be_read_and_written_apart(device) -> None:
    gate, up = guarded((5, 2 * 72), torch.bfloat16, device).chunk(2, -1)
    dh = guarded((1, 72), torch.bfloat16, device).expand(5, 72)
    buffers = [torch.full((5, 80), torch.nan, device=device).bfloat16() for _ in range(3)]
    outs = [buffer[:, :72] for buffer in buffers]
    kernels.gated(gate, up, "silu", outs[0])
    kernels.gated_backward(dh, gate, up, "silu", (outs[1], outs[2]))
    dense = gate.contiguous(), up.contiguous()
    results = (
        kernels.gated(*dense, "silu"),
        *kernels.gated_backward(dh.contiguous(), *dense, "silu"),
    )
    for out, buffer, result in zip(outs, buffers, results, strict=True):
        assert torch.equal(out, result) and buffer[:, 72:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EVERY
def test_the_ops_run_these_kernels_on_a_gpu(activation, device) -> None:
    gate, up = (guarded((3, 40), torch.bfloat16, device).requires_grad_() for _ in range(2))
    operands = gate.detach(), gate.detach(), up.detach()
    for room in (0, 8):
        torch.library.opcheck(gated, (gate, up, activation, room))
        torch.library.opcheck(gated_backward, (*operands, activation, room))
