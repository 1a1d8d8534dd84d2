"""Hidden states -> cross entropy of a frozen output head, without the matrix of logits.

Rows are worked through in chunks: logits of a chunk, their gradient in the same place, and from
that the gradient of the hidden states, all in the forward pass. The loss of a row depends on its
own hidden state only, so the backward pass just scales each row, by 1 where losses are summed.
Compared with keeping the logits this costs no additional product (the weight of the head is frozen,
so its gradient is not needed), and memory is a chunk of logits plus one more [N, I]. Cut cross
entropy (arXiv 2411.09009) keeps less and computes the logits twice.

Chunks are as large as is useful: each one reads the whole weight, twice. Rows are filled up to a
multiple of 64, because the number of supervised tokens is another one in each step, and matrix
libraries prepare and keep code for every shape they meet: on the CPU, megabytes a step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.scratch import scratch
from qtune_kernels.softmax_gradient import softmax_gradient_, softmax_losses

# bytes of the logits of a chunk
CPU_CHUNK_BYTES = 64 << 20
CUDA_CHUNK_BYTES = 256 << 20
# fewer rows would make products wait for the weight
CUDA_LEAST_ROWS = 1024
ROW_MULTIPLE = 64
# rows at a time in the backward pass, which goes through float32
SCALED_ROWS = 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum over rows of `linear_token_losses`, float32 [], differentiable by `hidden` [N, I]."""
    return linear_token_losses(hidden, weight, targets, bias, softcap, scale).sum()


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """-log softmax(x)[target] of each row, float32 [N], differentiable by `hidden` [N, I].

    x = scale (hidden W^T + bias), or softcap tanh(x / softcap) of that; W is [V, I] in the dtype of
    `hidden`, targets are int64 [N]. Raises ValueError where the head is to be trained: its gradient
    is not made here.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("linear_token_losses makes no gradient for the head: freeze it")
    with_gradient = hidden.requires_grad and torch.is_grad_enabled()
    head = (weight, targets, bias, softcap, scale)
    losses: Tensor = losses_and_dhidden(hidden, *head, with_gradient)[0]
    return losses


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of `token_losses`, float32 [], differentiable by `logits` [N, V]."""
    return token_losses(logits, targets).sum()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row, float32 [N], differentiable by `logits` [N, V].

    Targets are int64 [N]. For models whose logits are there anyway; it keeps their gradient.
    """
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    losses: Tensor = losses_and_dlogits(logits, targets, with_gradient)[0]
    return losses


def chunk_rows(num_rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits `linear_cross_entropy` of that many rows holds at a time."""
    row_bytes = vocabulary * dtype.itemsize
    if device.type == "cuda":
        most = max(CUDA_LEAST_ROWS, CUDA_CHUNK_BYTES // row_bytes)
    else:
        most = CPU_CHUNK_BYTES // row_bytes
    most = max(1, most // ROW_MULTIPLE) * ROW_MULTIPLE
    return min(most, num_rows + _num_filling(num_rows))


@torch.library.custom_op("qtune::linear_cross_entropy", mutates_args=())
def losses_and_dhidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_token_losses`, and the gradient of their sum [N, I], or [0, I] if not wanted."""
    num_rows, vocabulary = len(targets), len(weight)
    losses = hidden.new_empty(num_rows, dtype=torch.float32)
    hidden = pad(hidden, (0, 0, 0, _num_filling(num_rows)))
    dhidden = hidden.new_empty(len(hidden) if with_gradient else 0, hidden.shape[1])
    step = chunk_rows(num_rows, vocabulary, hidden.dtype, hidden.device)
    buffer = _buffer(step, vocabulary, hidden)
    for first in range(0, num_rows, step or 1):
        chunk, live = slice(first, first + step), slice(first, min(first + step, num_rows))
        logits = _linear_into(buffer, hidden[chunk], weight, bias)
        live_logits = logits[: live.stop - first]
        if with_gradient:
            softmax_gradient_(live_logits, targets[live], losses[live], softcap, scale)
            _dhidden_into(dhidden[chunk], logits, weight)
        else:
            losses[live] = softmax_losses(live_logits, targets[live], softcap, scale)
    return losses, dhidden[:num_rows]


@losses_and_dhidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = len(targets) if with_gradient else 0
    losses = hidden.new_empty(len(targets), dtype=torch.float32)
    return losses, hidden.new_empty(num_rows, hidden.shape[1])


@torch.library.custom_op("qtune::cross_entropy", mutates_args=())
def losses_and_dlogits(
    logits: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the gradient of their sum [N, V], or [0, V] if not wanted."""
    if not with_gradient:
        losses = softmax_losses(logits.contiguous(), targets, None, 1.0)
        return losses, logits.new_empty(0, logits.shape[1])
    gradient = logits.clone(memory_format=torch.contiguous_format)
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    softmax_gradient_(gradient, targets, losses, None, 1.0)
    return losses, gradient


@losses_and_dlogits.register_fake
def _(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    num_rows = len(targets) if with_gradient else 0
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    return losses, logits.new_empty(num_rows, logits.shape[1])


def _num_filling(num_rows: int) -> int:
    return -num_rows % ROW_MULTIPLE


def _buffer(num_rows: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """Uninitialized logits [rows, V]; on the CPU kept between calls."""
    if hidden.device.type != "cpu":
        return hidden.new_empty(num_rows, vocabulary)
    return scratch("logits", num_rows * vocabulary, hidden.dtype).view(num_rows, vocabulary)


def _linear_into(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden W^T + bias in the first rows of the buffer, [n, V]."""
    logits = buffer[: len(hidden)]
    if hidden.is_cpu:
        from qtune_kernels.cpu.product import multiplies, product

        if multiplies(hidden, weight):
            return product(hidden, weight, outputs_first=True, bias=bias, out=logits)
    if bias is None:
        return torch.mm(hidden, weight.T, out=logits)
    return torch.addmm(bias, hidden, weight.T, out=logits)


def _dhidden_into(dhidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """Write dlogits W, [n, I]."""
    if dlogits.is_cpu:
        from qtune_kernels.cpu.product import multiplies, product

        if multiplies(dlogits, weight):
            product(dlogits, weight, outputs_first=False, out=dhidden)
            return
    torch.mm(dlogits, weight, out=dhidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.num_others = len(inputs) - 1


def _backward(ctx: Any, dlosses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    scaled = torch.empty_like(gradient)
    pieces = (rows.split(SCALED_ROWS) for rows in (gradient, dlosses[:, None], scaled))
    for part, factors, out in zip(*pieces, strict=True):
        out.copy_(part.float() * factors)
    return scaled, *[None] * ctx.num_others


losses_and_dhidden.register_autograd(_backward, setup_context=_save)
losses_and_dlogits.register_autograd(_backward, setup_context=_save)
