"""Cross entropy and its gradient in one kernel, against float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtune_kernels.cpu.jit import available
from qtune_kernels.cpu.softmax_gradient import softmax_losses, takes

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


def truth(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    x = logits.double().requires_grad_()
    losses = cross_entropy(x * scale, targets, reduction="none")
    losses.sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("size", [1.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (5, 16), (4, 1000), (2, 50257)])
def test_losses_and_gradient(shape, size, scale) -> None:
    around = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=torch.bfloat16)
    logits = around[1:-1].copy_(torch.randn(shape) * size)
    targets = torch.randint(shape[1], shape[:1])
    losses, gradient = truth(logits, targets, scale)
    found = softmax_losses(logits, targets, scale, with_gradient=True)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-5)
    # one rounding to bf16, of numbers that float32 has to 2e-6
    torch.testing.assert_close(logits.double(), gradient, rtol=2.0**-8, atol=2e-6)
    assert around[0].isnan().all() and around[-1].isnan().all()


def test_losses_alone_leave_the_logits() -> None:
    logits = torch.randn(4, 100).bfloat16()
    before, targets = logits.clone(), torch.randint(100, (4,))
    found = softmax_losses(logits, targets, 1.0, with_gradient=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.double(), truth(logits, targets, 1.0)[0], rtol=1e-6, atol=1e-5)


def test_what_is_taken() -> None:
    logits = torch.empty(2, 3, dtype=torch.bfloat16)
    assert takes(logits, None)
    assert not takes(logits, 30.0)
    assert not takes(logits.float(), None)
