"""The CUDA kernel of `softmax_gradient_` and `softmax_losses`: one program a row, read twice.

The first pass keeps a running maximum and sum of exponentials in every lane (arXiv 1805.02867),
which are joined once at the end of the row, so the loop has no barrier; the second writes the
gradient over the logits, which the cache mostly still holds.

tanh is made of an exponential, because Triton has it only in a library that the interpreter lacks.
Its error, 1e-7 of the soft cap, is far below the rounding of 16-bit logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# columns that a program takes at a time
BLOCK = 4096
WARPS = 8
# below every logit that is not infinite; the difference of two infinities is no number
_LOWEST = tl.constexpr(-1e38)
# the hardware's exponential is that of 2
_LOG2_E = tl.constexpr(1.4426950408889634)


def softmax_gradient_(
    logits: Tensor, targets: Tensor, losses: Tensor, softcap: float | None, scale: float
) -> None:
    """Losses into `losses`, float32 [N], and gradients over `logits` [N, V], contiguous."""
    _launch(logits, targets, losses, softcap, scale, gradient=True)


def softmax_losses(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Losses, float32 [N], of contiguous logits [N, V]."""
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    _launch(logits, targets, losses, softcap, scale, gradient=False)
    return losses


def _launch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float | None,
    scale: float,
    *,
    gradient: bool,
    block: int = BLOCK,
) -> None:
    assert logits.is_contiguous()
    if not len(targets):
        return
    with torch.cuda.device_of(logits):
        _softmax_kernel[(len(targets),)](
            logits,
            targets.contiguous(),
            losses,
            logits.shape[1],
            SOFTCAP=softcap,
            SCALE=scale,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _capped(logit, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """What goes into the softmax, and its derivative by the logit, both float32."""
    x = logit.to(tl.float32) * SCALE
    slope = SCALE
    if SOFTCAP is not None:
        # where the exponential is infinite, this is 1
        ratio = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2_E / SOFTCAP)))
        x = ratio * SOFTCAP
        slope = (1.0 - ratio * ratio) * SCALE
    return x, slope


@triton.jit
def _softmax_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    num_columns,
    SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_columns
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, num_columns, BLOCK):
        live = first + lane < num_columns
        x, _ = _capped(tl.load(row_ptr + first + lane, mask=live, other=0.0), SOFTCAP, SCALE)
        x = tl.where(live, x, -float("inf"))
        # one of the two exponentials of the recurrence is always that of 0
        ratio = tl.exp2(tl.abs(x - largest) * -_LOG2_E)
        sums = tl.where(x > largest, sums * ratio + 1.0, sums + ratio)
        largest = tl.maximum(largest, x)
    row_largest = tl.reduce(largest, 0, _larger)
    row_sum = tl.reduce(sums * tl.exp2((largest - row_largest) * _LOG2_E), 0, _plus)

    target = tl.load(targets_ptr + row)
    # a target outside the vocabulary makes the loss NaN, which training refuses
    inside = (target >= 0) & (target < num_columns)
    target = target.to(tl.int32)
    chosen, _ = _capped(tl.load(row_ptr + target, mask=inside, other=float("nan")), SOFTCAP, SCALE)
    tl.store(losses_ptr + row, row_largest - chosen + tl.log(row_sum))
    if GRADIENT:
        # every thread has read the logit of the target before one overwrites it
        tl.debug_barrier()
        factor = 1.0 / row_sum
        for first in range(0, num_columns, BLOCK):
            column = first + lane
            live = column < num_columns
            x, slope = _capped(tl.load(row_ptr + column, mask=live, other=0.0), SOFTCAP, SCALE)
            probability = tl.exp2((x - row_largest) * _LOG2_E) * factor
            gradient = (probability - (column == target).to(tl.float32)) * slope
            tl.store(row_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=live)
