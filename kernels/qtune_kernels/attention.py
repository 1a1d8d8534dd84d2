"""Causal attention within samples that lie end to end, grouped-query heads and windows included.

Autograd keeps q, k, v and one number for each query and head, its logarithm of the sum of
exponentials, from which the backward makes the weights again (FlashAttention, arXiv 2205.14135).
On a CPU with AMX the kernels of cpu/attention.py run; elsewhere the plain version, which has all
scores of a sample in memory and is there to compare with: `is_fused` tells which.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("qtune::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """y [T, H, D] in the dtype of q, and lse float32 [H, T], which has no gradient.

    q [T, H, D] and k, v [T, K, D] are rows of samples of those lengths; H is a multiple of K. A
    query sees itself and what comes before it in its sample, with a `window` only that many keys.
    Raises ValueError where shapes or lengths do not fit.
    """
    _check(q, k, v, lengths, window)
    return _forward(q, k, v, lengths, scale, window)


@packed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, lengths, window)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@packed_attention.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import attention as native

    _check(q, k, v, lengths, window)
    run = native.forward if is_fused(q, k, v, scale) else _forward
    return run(q, k, v, lengths, scale, window)


@torch.library.custom_op("qtune::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, H, D], dk and dv [T, K, D] in the dtype of q, from dy [T, H, D] and the forward's lse.

    Raises ValueError where shapes or lengths do not fit.
    """
    _check(q, k, v, lengths, window)
    _check_gradient(dy, q, lse)
    return _backward(dy, q, k, v, lse, lengths, scale, window)


@packed_attention_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@packed_attention_backward.register_kernel("cpu")
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from qtune_kernels.cpu import attention as native

    _check(q, k, v, lengths, window)
    _check_gradient(dy, q, lse)
    run = native.backward if is_fused(q, k, v, scale) else _backward
    return run(dy.to(q.dtype), q, k, v, lse, lengths, scale, window)


def is_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, device_type: str | None = None) -> bool:
    """Whether a kernel runs for these tensors, or would if they lay on such a device."""
    if (device_type or q.device.type) != "cpu":
        return False
    from qtune_kernels.cpu import attention as native

    return native.attends(q, k, v, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int) -> None:
    (rows, heads, width), key_heads = q.shape, k.shape[1]
    if k.shape != (rows, key_heads, width) or v.shape != k.shape or heads % key_heads:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v of shapes {shapes} do not fit together")
    if sum(lengths) != rows or min(lengths, default=0) < 1:
        raise ValueError(f"{rows} rows cannot be samples of lengths {list(lengths)}")
    if window < 0:
        raise ValueError(f"a window of {window} keys")


def _check_gradient(dy: Tensor, q: Tensor, lse: Tensor) -> None:
    if dy.shape != q.shape or lse.shape != (q.shape[1], q.shape[0]):
        shapes = ", ".join(str(list(t.shape)) for t in (dy, q, lse))
        raise ValueError(f"dy, q and lse of shapes {shapes} do not fit together")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    ys, lses = [], []
    for qs, ks, vs in _samples(lengths, q, k, v, group=q.shape[1] // k.shape[1]):
        scores = _scores(qs, ks, scale, window)
        lses.append(scores.logsumexp(-1))
        ys.append((scores.softmax(-1) @ vs).transpose(0, 1))
    return torch.cat(ys).to(q.dtype), torch.cat(lses, 1).float()


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    samples = zip(
        _samples(lengths, q, k, v, group=group),
        dy.to(_wide(dy)).transpose(0, 1).split(list(lengths), 1),
        lse.split(list(lengths), 1),
        strict=True,
    )
    parts = [_gradients(*qkv, dys, lses, scale, window) for qkv, dys, lses in samples]
    dq, dk, dv = (torch.cat(part, 1).transpose(0, 1) for part in zip(*parts, strict=True))
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    dq, dk, dv = (t.contiguous().to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a sample, each [H, L, D]; dk and dv of each query head by itself."""
    weights = (_scores(q, k, scale, window) - lse.unsqueeze(-1)).exp()
    dweights = dy @ v.transpose(1, 2)
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    return dscores @ k, dscores.transpose(1, 2) @ q, weights.transpose(1, 2) @ dy


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """Scaled scores [H, L, L], -inf where a query does not see a key."""
    at = torch.arange(q.shape[1], device=q.device)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < (window or len(at)))
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)


def _samples(
    lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, *, group: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each sample's q, k and v, [H, L, D] in float32 or wider, keys repeated for their queries."""
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    q, k, v = (t.to(_wide(t)).transpose(0, 1) for t in (q, k, v))
    sizes = list(lengths)
    return zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.scale, ctx.window = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, lse)


def _autograd(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 6
    settings = ctx.lengths, ctx.scale, ctx.window
    gradients = packed_attention_backward(dy, *ctx.saved_tensors, *settings)
    return *gradients, None, None, None


packed_attention.register_autograd(_autograd, setup_context=_save)
