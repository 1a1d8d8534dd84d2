"""Losses and gradients against torch in float64, natively and in plain PyTorch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtune_kernels.cpu import softmax_gradient as native
from qtune_kernels.cpu.jit import available
from qtune_kernels.softmax_gradient import ROWS, softmax_gradient_, softmax_losses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARY = 301
# soft cap, scale
CAPS = [(None, 1.0), (5.0, 1.0), (None, 0.125), (2.0, 3.0)]


@pytest.fixture(autouse=True, params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "takes", lambda *_: False)
    elif not available():
        pytest.skip("no kernels for this processor")


def sample(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_rows, VOCABULARY) * 3
    return logits.to(dtype), torch.randint(VOCABULARY, (num_rows,))


def truth(
    logits: Tensor, targets: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Losses [N] and the gradient of their sum [N, V], float64."""
    z = logits.detach().double().requires_grad_()
    x = z * scale
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    losses = cross_entropy(x, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), gradient


def error_of_plain(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding to the dtype costs."""
    return (gradient.to(dtype).double() - gradient).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), CAPS)
@pytest.mark.parametrize("num_rows", [1, ROWS, 3 * ROWS + 5])
def test_against_float64(num_rows, softcap, scale, dtype) -> None:
    logits, targets = sample(num_rows, dtype)
    losses_truth, gradient = truth(logits, targets, softcap, scale)
    losses = torch.full((num_rows,), torch.nan)
    alone = softmax_losses(logits, targets, softcap, scale)
    softmax_gradient_(logits, targets, losses, softcap, scale)
    assert torch.equal(alone, losses)
    torch.testing.assert_close(losses.double(), losses_truth, rtol=1e-5, atol=1e-5)
    error = (logits.double() - gradient).norm()
    assert error <= 2 * error_of_plain(gradient, dtype) + 1e-5 * gradient.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4, 6e4])
def test_extreme_logits(size: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, VOCABULARY, dtype=dtype)
    logits[:, 7] = size
    logits[1:, 8] = -size
    logits[2] = size
    targets = torch.tensor([7, 7, 100, 8])
    losses_truth, gradient = truth(logits, targets, None, 1.0)
    losses = torch.empty(4)
    softmax_gradient_(logits, targets, losses, None, 1.0)
    torch.testing.assert_close(losses.double(), losses_truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, atol=2e-6, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits_of_forbidden_tokens(dtype) -> None:
    logits, targets = sample(3, dtype)
    logits[:, 0] = -torch.inf
    logits[0, :290] = -torch.inf
    targets[:] = torch.tensor([300, 2, 3])
    losses_truth, gradient = truth(logits, targets, None, 1.0)
    losses = torch.empty(3)
    softmax_gradient_(logits, targets, losses, None, 1.0)
    torch.testing.assert_close(losses.double(), losses_truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, atol=2e-6, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [5, 300])
def test_nan_is_not_hidden(at, dtype) -> None:
    logits, targets = sample(3, dtype)
    logits[1, at] = torch.nan
    assert softmax_losses(logits, targets, None, 1.0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_a_target_outside_the_vocabulary_is_refused(target, dtype) -> None:
    logits, targets = sample(3, dtype)
    targets[1] = target
    with pytest.raises((IndexError, RuntimeError)):
        softmax_losses(logits, targets, None, 1.0)
    with pytest.raises((IndexError, RuntimeError)):
        softmax_gradient_(logits, targets, torch.empty(3), None, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype) -> None:
    logits, targets = sample(0, dtype)
    assert softmax_losses(logits, targets, None, 1.0).shape == (0,)
    softmax_gradient_(logits, targets, torch.empty(0), None, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 3.0)])
def test_the_ops_keep_the_rules_of_torch(softcap, scale, dtype) -> None:
    logits, targets = sample(5, dtype)
    torch.library.opcheck(softmax_losses, (logits, targets, softcap, scale))
    torch.library.opcheck(softmax_gradient_, (logits, targets, torch.zeros(5), softcap, scale))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), CAPS)
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_cuda_is_as_exact(vocabulary, softcap, scale, dtype) -> None:
    logits = (torch.randn(300, vocabulary, device="cuda") * 3).to(dtype)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    losses_truth, gradient = truth(logits, targets, softcap, scale)
    losses = torch.full((300,), torch.nan, device="cuda")
    softmax_gradient_(logits, targets, losses, softcap, scale)
    torch.testing.assert_close(losses.double(), losses_truth, rtol=1e-5, atol=1e-5)
    error = (logits.double() - gradient).norm()
    assert error <= 2 * error_of_plain(gradient, dtype) + 1e-5 * gradient.norm()
