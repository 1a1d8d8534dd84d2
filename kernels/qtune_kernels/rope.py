"""Rotary position embedding (arXiv 2104.09864) of queries and keys, in one pass.

It is the half-rotation of transformers' `apply_rotary_pos_emb`: element i turns with i + R/2, by
cosines and sines of that model's own making. Where these are narrower than the heads (R < D), the
rest of each head stays as it is. Unlike there, products are float32 and rounded once. The backward
pass is the inverse rotation, so autograd keeps cosines and sines only. Results lie in memory as
[B, T, H, D], as the product does that q comes from.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("qtune::rope", mutates_args=())
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] and k, which may have fewer heads, rotated, in their dtypes.

    cos and sin are [1 or B, T, R], R even and at most D; `inverse` turns the other way round.
    Raises ValueError for other shapes.
    """
    _check(q, k, cos, sin)
    return _rope(q, cos, sin, inverse), _rope(k, cos, sin, inverse)


@rope.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    return rotated_like(q), rotated_like(k)


@rope.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import rope, rowwise

    _check(q, k, cos, sin)
    turn = rope.rope if rowwise.takes(q, k) and rowwise.takes(cos, sin) else _rope
    return turn(q, cos, sin, inverse), turn(k, cos, sin, inverse)


@rope.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    from qtune_kernels import rope_triton

    _check(q, k, cos, sin)
    return rope_triton.rope(q, k, cos, sin, inverse)


def rotated_like(x: Tensor) -> Tensor:
    """An uninitialized [B, H, T, D] that lies in memory as [B, T, H, D]."""
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, _, tokens, size = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, tokens, size):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} differ in more than heads")
    rotated = cos.shape[-1]
    fits = rotated % 2 == 0 and rotated <= size and cos.shape[0] in (1, batch)
    if sin.shape != cos.shape or cos.shape[1:] != (tokens, rotated) or not fits:
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [1 or {batch}, {tokens}, "
            f"an even number up to {size}]"
        )


def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    first, second = x[..., :rotated].float().chunk(2, -1)
    if inverse:
        # the transpose of the rotation, whatever the two halves of the sines are
        sin = -sin.roll(rotated // 2, -1)
    y = rotated_like(x)
    y[..., :rotated] = torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin
    y[..., rotated:] = x[..., rotated:]
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


rope.register_autograd(_backward, setup_context=_save)
