"""Random problems for what surrounds the linear layers: norms, gates, rotations, loss."""

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, silu

from gpu.case import Context
from gpu.problem import Problem
from qtune_kernels.cross_entropy import linear_cross_entropy
from qtune_kernels.norm import add_rms_norm, rms_norm
from qtune_kernels.rope import rope
from qtune_kernels.swiglu import gated

EPS = 1e-5
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _size(rng: random.Random, context: Context, most: int) -> int:
    return rng.randint(1, 9 if context.quick else most)


def _draw(rng: random.Random, context: Context, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=context.device, dtype=dtype)


def _facts(x: Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def _normed(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    held = x if x.dtype == torch.float64 else x.float()
    normal = held * torch.rsqrt(held.square().mean(-1, keepdim=True) + EPS)
    return (normal * (weight.to(held.dtype) + offset)).to(x.dtype)


def _rms_norm(rng: random.Random, context: Context) -> Problem:
    width, dtype, offset = _size(rng, context, 5000) * 2 + 1, rng.choice(FLOATS), rng.choice((0, 1))
    x = _draw(rng, context, 2, _size(rng, context, 200), width, dtype=dtype)
    weight = _draw(rng, context, width, dtype=dtype)
    return Problem(
        lambda x: rms_norm(x, weight, EPS, float(offset)),
        lambda x: _normed(x, weight, offset),
        (x,),
        _facts(x) | {"offset": offset},
    )


def _add_rms_norm(rng: random.Random, context: Context) -> Problem:
    width, dtype = _size(rng, context, 5000) * 2 + 1, rng.choice(FLOATS)
    x = _draw(rng, context, _size(rng, context, 300), width, dtype=dtype)
    weight = _draw(rng, context, width, dtype=dtype)

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return _normed(total, weight, 0), total

    residual = torch.randn_like(x)
    return Problem(
        lambda x, r: add_rms_norm(x, r, weight, EPS, 0.0), plain, (x, residual), _facts(x)
    )


def _gated(rng: random.Random, context: Context) -> Problem:
    shape = _size(rng, context, 300), _size(rng, context, 5000) * 2 + 1
    activation = rng.choice(("silu", "gelu_tanh"))
    gate = _draw(rng, context, *shape, dtype=rng.choice(FLOATS))

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        act = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
        return act * up

    return Problem(
        lambda gate, up: gated(gate, up, activation),
        plain,
        (gate, torch.randn_like(gate)),
        _facts(gate) | {"activation": activation},
    )


def _rope(rng: random.Random, context: Context) -> Problem:
    batch, tokens = rng.randint(1, 3), _size(rng, context, 400)
    size, dtype = rng.choice((64, 96, 128)), rng.choice(FLOATS)
    heads = rng.choice((1, 3, 8))
    q = _draw(rng, context, batch, heads * rng.randint(1, 4), tokens, size, dtype=dtype)
    k = _draw(rng, context, batch, heads, tokens, size, dtype=dtype)
    angles = torch.rand(1, tokens, size // 2, device=context.device).repeat(1, 1, 2) * 6.3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _turned(q, cos, sin), _turned(k, cos, sin)

    return Problem(lambda q, k: rope(q, k, cos, sin), plain, (q, k), _facts(q))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return x * cos + torch.cat([-second, first], -1) * sin


def _cross_entropy(rng: random.Random, context: Context) -> Problem:
    rows, width = _size(rng, context, 3000), 64 * rng.randint(1, 2 if context.quick else 16)
    vocabulary = (33 if context.quick else rng.randint(500, 20000)) | 1
    hidden = _draw(rng, context, rows, width, dtype=rng.choice(FLOATS[:2]))
    head = (_draw(rng, context, vocabulary, width, dtype=torch.float32) / 10).to(hidden.dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=context.device)

    def plain(hidden: Tensor) -> Tensor:
        logits = hidden @ head.to(hidden.dtype).T
        held = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(held, targets, reduction="sum")

    return Problem(
        lambda hidden: linear_cross_entropy(hidden, head, targets),
        plain,
        (hidden,),
        _facts(hidden) | {"vocabulary": vocabulary},
    )


MAKERS = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "gated": _gated,
    "rope": _rope,
    "linear_cross_entropy": _cross_entropy,
}
