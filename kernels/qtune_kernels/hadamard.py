"""The randomised Hadamard transform (arXiv 2402.04396, section 3): rows times an orthogonal matrix.

R = diag(signs) H / sqrt(n) spreads every input over all of them, so that weights and inputs have
no outliers left. Signs and H are those of hadamard_matrices.py; nothing is stored. Sums are
float32 and rounded once. The backward pass is the same transform transposed, and keeps nothing.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtune_kernels.hadamard_matrices import kronecker, orders, signs

# numbers transformed at a time: on the CPU a few MiB in float32, which stay in the cache
CHUNK = 1 << 20
_LARGE_CHUNK = 1 << 26
# a further pass over the rows costs as much as so many more products for each number
_PASS = 192


@torch.library.custom_op("qtune::hadamard", mutates_args=())
def hadamard(x: Tensor, transposed: bool = False, seed: int = 0) -> Tensor:
    """x R, or x R^T where `transposed`, in the shape [..., I] and dtype of x.

    `seed` chooses the signs: inputs and outputs of a square matrix need different ones.
    """
    return _in_chunks(x, transposed, seed)


@hadamard.register_fake
def _(x: Tensor, transposed: bool = False, seed: int = 0) -> Tensor:
    return x.new_empty(x.shape)


@hadamard.register_kernel("cpu")
def _(x: Tensor, transposed: bool = False, seed: int = 0) -> Tensor:
    from qtune_kernels.cpu import hadamard as native

    if native.transforms(x):
        return native.hadamard(x, transposed, seed)
    return _in_chunks(x, transposed, seed)


@hadamard.register_kernel("cuda")
def _(x: Tensor, transposed: bool = False, seed: int = 0) -> Tensor:
    from qtune_kernels import hadamard_triton

    if not hadamard_triton.takes(x):
        return _in_chunks(x, transposed, seed)
    return hadamard_triton.hadamard(x, transposed, seed)


def _in_chunks(x: Tensor, transposed: bool, seed: int) -> Tensor:
    width = x.shape[-1]
    y = x.new_empty(x.shape)
    rows, out = x.reshape(-1, width), y.view(-1, width)
    chunk = CHUNK if x.device.type == "cpu" else _LARGE_CHUNK
    step = max(1, chunk // max(1, width))
    for at in range(0, len(rows), step):
        out[at : at + step] = _rotated(rows[at : at + step], transposed, seed)
    return y


def _rotated(rows: Tensor, transposed: bool, seed: int) -> Tensor:
    """[T, I] times R or its transpose, in float32, or in float64 where the rows are."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    width, num_blocks = rows.shape[-1], orders(rows.shape[-1]).num_blocks
    factors = _factors(width, dtype, rows.device)
    random = _signs(width, seed, dtype, rows.device) / math.sqrt(width // num_blocks)
    if transposed:
        return _multiply(rows.to(dtype), num_blocks, factors, transposed) * random
    return _multiply(rows * random, num_blocks, factors, transposed)


def _multiply(
    rows: Tensor, num_blocks: int, factors: tuple[Tensor, ...], transposed: bool
) -> Tensor:
    """[T, I] times the Kronecker product in each block, or its transpose."""
    shape = rows.shape
    outer, inner = len(rows) * num_blocks, shape[1] // num_blocks
    for factor in factors:
        order = len(factor)
        inner //= order
        left = factor if transposed else factor.T
        rows = rows.reshape(outer, order, inner)
        rows = rows.squeeze(2) @ left.T if inner == 1 else left @ rows
        outer *= order
    return rows.reshape(shape)


@cache
def _grouped(parts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Neighbours put together, so that products and passes over the rows cost least."""
    if not parts:
        return ()
    choices = [(parts[:end], *_grouped(parts[end:])) for end in range(1, len(parts) + 1)]
    return min(choices, key=lambda groups: sum(math.prod(group) + _PASS for group in groups))


@cache
def _factors(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    groups = _grouped(orders(width).factors)
    return tuple(kronecker(group).to(device, dtype) for group in groups)


@cache
def _signs(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return signs(width, seed).to(device, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.transposed, ctx.seed = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return hadamard(dy, not ctx.transposed, ctx.seed), None, None


hadamard.register_autograd(_backward, setup_context=_save)
