"""Logits -> cross entropy of each row, and the gradient of the logits in their place.

The gradient needs nothing that the loss has not computed, and nothing reads the logits afterwards:
overwriting them saves a matrix as large. Everything between is float32. The logits z of a model
may be scaled and soft-capped before the softmax (x = softcap tanh(scale z / softcap), Gemma 2,
arXiv 2408.00118); the gradient is that of z. The kernel for CUDA is in softmax_gradient_triton.py,
that for bf16 without a soft cap on the CPU in cpu/softmax_gradient.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# rows at a time on the CPU: a few MiB in float32 at the vocabularies in use
ROWS = 16


@torch.library.custom_op("qtune::softmax_gradient_", mutates_args=("logits", "losses"))
def softmax_gradient_(
    logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float
) -> None:
    """Write -log softmax(x)[target] into `losses`, float32 [N], and its gradient into `logits`.

    Logits are [N, V] of any float dtype, contiguous, targets int64 [N].
    """
    _softmax_gradient(logits, targets, losses, softcap, scale)


def _softmax_gradient(
    logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float
) -> None:
    for part, target, loss in _rows(logits, targets, losses):
        x, slope = _capped(part, softcap, scale)
        gradient = _probabilities(x, target, loss)
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        part.copy_(gradient if slope is None else gradient.mul_(slope))


@softmax_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float) -> None:
    return None


@softmax_gradient_.register_kernel("cpu")
def _(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float) -> None:
    from qtune_kernels.cpu import softmax_gradient as native

    if native.takes(logits, softcap):
        _check_inside(logits, targets)
        losses.copy_(native.softmax_losses(logits, targets, scale, with_gradient=True))
    else:
        _softmax_gradient(logits, targets, losses, softcap, scale)


@softmax_gradient_.register_kernel("cuda")
def _(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float) -> None:
    from qtune_kernels import softmax_gradient_triton

    softmax_gradient_triton.softmax_gradient_(logits, targets, losses, softcap, scale)


@torch.library.custom_op("qtune::softmax_losses", mutates_args=())
def softmax_losses(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    """-log softmax(x)[target] of every row, float32 [N]; arguments as in `softmax_gradient_`."""
    return _softmax_losses(logits, targets, softcap, scale)


def _softmax_losses(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    for part, target, loss in _rows(logits, targets, losses):
        _probabilities(_capped(part, softcap, scale)[0], target, loss)
    return losses


@softmax_losses.register_fake
def _(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    return logits.new_empty(len(targets), dtype=torch.float32)


@softmax_losses.register_kernel("cpu")
def _(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    from qtune_kernels.cpu import softmax_gradient as native

    if native.takes(logits, softcap):
        _check_inside(logits, targets)
        return native.softmax_losses(logits, targets, scale, with_gradient=False)
    return _softmax_losses(logits, targets, softcap, scale)


@softmax_losses.register_kernel("cuda")
def _(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    from qtune_kernels import softmax_gradient_triton

    return softmax_gradient_triton.softmax_losses(logits, targets, softcap, scale)


def _check_inside(logits: Tensor, targets: Tensor) -> None:
    """Compiled code would read, and write, where such a target points."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    torch._check_index(bool(inside.all()), lambda: "a target is not in the vocabulary")
    torch._check(logits.is_contiguous() and targets.is_contiguous())


def _rows(
    logits: Tensor, targets: Tensor, losses: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A few rows at a time: logits [n, V], targets [n, 1], losses [n]."""
    columns = targets.unsqueeze(1)
    return zip(*(t.split(ROWS) for t in (logits, columns, losses)), strict=True)


def _capped(z: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | float | None]:
    """x of logits z, and its derivative by z; None where that is 1."""
    if softcap is None:
        return (z, None) if scale == 1 else (z.float() * scale, scale)
    ratio = (z.float() * (scale / softcap)).tanh_()
    return ratio * softcap, ratio.square().neg_().add_(1).mul_(scale)


def _probabilities(x: Tensor, target: Tensor, loss: Tensor) -> Tensor:
    """softmax(x), float32 [n, V]; the losses are written into `loss` on the way."""
    p = torch.softmax(x, -1, dtype=torch.float32)
    # relative to the largest, whose probability cannot underflow
    behind = x.amax(-1, keepdim=True).float() - x.gather(1, target).float()
    loss.copy_(behind.squeeze(1) - p.amax(-1).log())
    return p
