"""The Triton kernel against float64, with guarded and poisoned buffers."""

import pytest
import torch
from test_softmax_gradient import CAPS, error_of_plain, truth
from torch import Tensor

triton_kernels = pytest.importorskip("qtune_kernels.softmax_gradient_triton")

GUARD = 64
BLOCK = 32


def inside_poison(values: Tensor) -> Tensor:
    """The values between NaN, so that what is read or written beyond them shows."""
    guarded = torch.full(
        (values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype, device=values.device
    )
    inner = guarded[GUARD:-GUARD].view(values.shape)
    return inner.copy_(values)


def guards_are_whole(inner: Tensor) -> bool:
    whole = inner.new_empty(0).set_(inner.untyped_storage())
    return bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all())


def launch(logits, targets, losses, softcap, scale, *, gradient=True) -> None:
    triton_kernels._launch(logits, targets, losses, softcap, scale, gradient=gradient, block=BLOCK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), CAPS)
@pytest.mark.parametrize("vocabulary", [BLOCK, 2 * BLOCK + 7, 5], ids=str)
def test_as_exact_as_torch(vocabulary, softcap, scale, dtype, device) -> None:
    logits = (torch.randn(3, vocabulary) * 4).to(dtype).to(device)
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2], device=device)
    losses_truth, gradient_truth = truth(logits, targets, softcap, scale)
    found = inside_poison(logits)
    losses = inside_poison(torch.full((3,), torch.nan, device=device))
    launch(found, targets, losses, softcap, scale)
    torch.testing.assert_close(losses.double(), losses_truth, rtol=1e-5, atol=1e-5)
    error = (found.double() - gradient_truth).norm()
    assert error <= 2 * error_of_plain(gradient_truth, dtype) + 1e-5
    assert guards_are_whole(found) and guards_are_whole(losses)


def test_losses_alone_leave_the_logits_as_they_are(device) -> None:
    logits = inside_poison(torch.randn(3, 50, device=device))
    before = logits.clone()
    targets = torch.tensor([3, 0, 49], device=device)
    losses = torch.full((3,), torch.nan, device=device)
    launch(logits, targets, losses, None, 1.0, gradient=False)
    torch.testing.assert_close(losses.double(), truth(logits, targets, None, 1.0)[0])
    assert torch.equal(logits, before)


def test_rows_of_the_size_that_is_used(device) -> None:
    logits = torch.randn(2, 130, device=device)
    targets = torch.tensor([129, 1], device=device)
    expected = truth(logits, targets, None, 1.0)
    losses = triton_kernels.softmax_losses(logits, targets, None, 1.0)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-5)
    triton_kernels.softmax_gradient_(logits, targets, losses, None, 1.0)
    torch.testing.assert_close(logits.double(), expected[1], rtol=1e-5, atol=1e-6)


def test_extremes(device) -> None:
    logits = torch.zeros(4, 70, device=device)
    logits[0, 7] = 1e4
    logits[1, :40] = -torch.inf
    logits[2, 3] = 1e38
    logits[3, 69] = -1e38
    targets = torch.tensor([7, 50, 3, 0], device=device)
    expected = truth(logits, targets, None, 1.0)
    losses = torch.full((4,), torch.nan, device=device)
    launch(logits, targets, losses, None, 1.0)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected[1], rtol=1e-5, atol=1e-6)


def test_neither_nan_nor_a_target_that_does_not_exist_is_hidden(device) -> None:
    logits = torch.randn(4, 70, device=device)
    logits[1, 60] = torch.nan
    losses = torch.zeros(4, device=device)
    launch(logits, torch.tensor([3, 3, 70, -100], device=device), losses, None, 1.0)
    assert losses.isnan().tolist() == [False, True, True, True]
