"""The CUDA kernel of `rope`: a program turns all heads of one token, queries and keys.

Cosines and sines of a token are read once for all its heads. Each of their halves is read by
itself, so nothing relies on the two being equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.rope import rotated_like

# elements a warp turns at a time
_WARP_ELEMENTS = 1024


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated, [B, H, T, D]."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    batch, num_heads, num_tokens, size = q.shape
    rotated = cos.shape[-1]
    heads, key_heads = (triton.next_power_of_2(t.shape[1]) for t in (q, k))
    turned_q, turned_k = rotated_like(q), rotated_like(k)
    with torch.cuda.device_of(q):
        _rope_kernel[(batch * num_tokens,)](
            q,
            k,
            cos,
            sin,
            turned_q,
            turned_k,
            num_tokens,
            num_heads,
            k.shape[1],
            *q.stride()[:3],
            *k.stride()[:3],
            *_row_strides(cos),
            *_row_strides(sin),
            INVERSE=inverse,
            HALF=rotated // 2,
            SIZE=size,
            HALF_BLOCK=triton.next_power_of_2(rotated // 2),
            REST_BLOCK=triton.next_power_of_2(size - rotated) if size > rotated else 0,
            HEADS=heads,
            KEY_HEADS=key_heads,
            num_warps=max(1, min(8, heads * size // _WARP_ELEMENTS)),
            enable_fp_fusion=True,
        )
    return turned_q, turned_k


def _row_strides(angles: Tensor) -> tuple[int, int]:
    """From one sample to the next, none where all share one, and from token to token."""
    return angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(1)


@triton.jit
def _turn(
    x_at,
    y_at,
    num_heads,
    head_stride,
    first_cos,
    second_cos,
    first_sin,
    second_sin,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn a token's heads, from where they begin to where the turned ones, all neighbours, do."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    live = (head < num_heads) & (column < HALF)
    x_at += head * head_stride
    y_at += head * SIZE
    first = tl.load(x_at + column, mask=live, other=0.0).to(tl.float32)
    second = tl.load(x_at + column + HALF, mask=live, other=0.0).to(tl.float32)
    DTYPE: tl.constexpr = y_at.dtype.element_ty
    turned = first * first_cos - second * first_sin
    tl.store(y_at + column, turned.to(DTYPE), mask=live)
    turned = second * second_cos + first * second_sin
    tl.store(y_at + column + HALF, turned.to(DTYPE), mask=live)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        live = (head < num_heads) & (rest < SIZE)
        tl.store(y_at + rest, tl.load(x_at + rest, mask=live, other=0.0), mask=live)


@triton.jit
def _halves(angles_at, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """The two halves of a token's cosines or sines, float32 [1, R / 2] each."""
    column = tl.arange(0, HALF_BLOCK)[None, :]
    first = tl.load(angles_at + column, mask=column < HALF, other=0.0)
    second = tl.load(angles_at + column + HALF, mask=column < HALF, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    turned_q_ptr,
    turned_k_ptr,
    num_tokens,
    num_heads,
    num_key_heads,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    cos_at = cos_ptr + sample * cos_batch_stride + token * cos_token_stride
    sin_at = sin_ptr + sample * sin_batch_stride + token * sin_token_stride
    first_cos, second_cos = _halves(cos_at, HALF, HALF_BLOCK)
    first_sin, second_sin = _halves(sin_at, HALF, HALF_BLOCK)
    if INVERSE:
        # the rotation's transpose
        first_sin, second_sin = -second_sin, -first_sin
    _turn(
        q_ptr + sample * q_batch_stride + token * q_token_stride,
        turned_q_ptr + place * num_heads * SIZE,
        num_heads,
        q_head_stride,
        first_cos,
        second_cos,
        first_sin,
        second_sin,
        HALF,
        SIZE,
        HALF_BLOCK,
        REST_BLOCK,
        HEADS,
    )
    _turn(
        k_ptr + sample * k_batch_stride + token * k_token_stride,
        turned_k_ptr + place * num_key_heads * SIZE,
        num_key_heads,
        k_head_stride,
        first_cos,
        second_cos,
        first_sin,
        second_sin,
        HALF,
        SIZE,
        HALF_BLOCK,
        REST_BLOCK,
        KEY_HEADS,
    )
