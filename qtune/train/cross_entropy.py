"""Cross entropy that keeps one matrix of the logits' own dtype, and no float32 copy of it.

Rows are worked through a few at a time in float32; each leaves its loss and the gradient of its
logits, softmax less one-hot, which the backward pass only has to scale.
"""

from typing import Any

import torch
from torch import Tensor

# rows at a time: a few MiB in float32 at the vocabularies in use
ROWS = 16


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(logits)
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        parts = zip(*(t.split(ROWS) for t in (logits, targets, gradient, losses)), strict=True)
        for part, target, slope, loss in parts:
            target = target.unsqueeze(1)
            p = torch.softmax(part, -1, dtype=torch.float32)
            # the largest probability cannot underflow, so the normaliser is read off there
            normaliser = part.amax(-1).float() - p.amax(-1).log()
            loss.copy_(normaliser - part.gather(1, target).squeeze(1).float())
            slope.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[target], float32 [].

    Logits are [N, V], targets int64 [N]. Its backward pass may run once.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss
