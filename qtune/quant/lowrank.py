"""Where an adapter begins: a product B A of low rank that is close to what quantization took away.

`cloq` minimises the change of the layer's outputs, tr(E H E^T) with E = W - Q - B A, in closed
form (QERA, arXiv 2410.06040; CLoQ, 2501.18475). With H = L L^T the best B A is the truncated SVD of
(W - Q) L, times L^-1. Its left vectors are the eigenvectors of (W - Q) H (W - Q)^T, and B A is
W - Q projected onto them, so the smaller of two matrices is decomposed. `loftq` (2310.08659)
minimises the change of the weights, choosing codes and adapter in turns. `pissa` (2404.02948) gives
the adapter the largest part of the weight itself, and codes to the rest.

The two vectors of each rank have the same length, so that one learning rate suits both matrices.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qtune.progress import say
from qtune.quant.hessian import Note, damped
from qtune.quant.linear import QuantLinear

Init = Literal["cloq", "loftq", "pissa"]
# the tensors of a layer for a dense weight [O, I]
Encode = Callable[[Tensor], dict[str, Tensor]]
# as in its paper; the first turn gains most
LOFTQ_TURNS = 5


def start(
    init: Init,
    weight: Tensor,
    layer: QuantLinear,
    hessian: Tensor | None,
    rank: int,
    *,
    damping: float = 0.01,
    encode: Encode | None = None,
    note: Note = say,
) -> tuple[dict[str, Tensor] | None, Tensor, Tensor]:
    """New tensors of the layer, or None where its codes stay, A [R, I] and B [O, R] in float32.

    The layer has its codes, and afterwards those returned; `encode` finds new ones, by default the
    nearest. `hessian` [I, I], over plain inputs, is for `cloq` alone. The adapter's output is
    x A^T B^T: its scaling is not yet in.
    """
    weight = weight.float()
    rank = min(rank, *weight.shape)
    encode = encode or (lambda dense: layer.pack(dense, layer.channel_factors))
    if init == "cloq":
        if hessian is None:
            raise ValueError("cloq needs a Hessian")
        error = weight - layer.dequantize(torch.float32)
        return None, *_least_output_error(error, hessian, rank, damping, note)
    if init == "pissa":
        a, b = closest(weight, rank)
        tensors = encode(weight - b @ a)
        layer.load(tensors)
        return tensors, a, b
    return _loftq(weight, layer, rank, encode)


def closest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R], float32, whose product is closest to a float matrix [O, I]."""
    exact = matrix.double()
    wide = exact if len(exact) <= exact.shape[1] else exact.T
    vectors = _top_vectors(wide @ wide.T, rank)
    b, a = _balanced(vectors, vectors.T @ wide)
    return (a, b) if wide is exact else (b.T.contiguous(), a.T.contiguous())


def _loftq(
    weight: Tensor, layer: QuantLinear, rank: int, encode: Encode
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    product = torch.zeros_like(weight)
    for _ in range(LOFTQ_TURNS):
        tensors = encode(weight - product)
        layer.load(tensors)
        a, b = closest(weight - layer.dequantize(torch.float32), rank)
        product = b @ a
    return tensors, a, b


def _least_output_error(
    error: Tensor, hessian: Tensor, rank: int, damping: float, note: Note
) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] that make up for most of an error [O, I] of the weight."""
    exact = error.double()
    regular, lower = damped(hessian, damping, note)
    if len(exact) <= exact.shape[1]:
        vectors = _top_vectors(exact @ regular @ exact.T, rank)
        b, a = _balanced(vectors, vectors.T @ exact)
        return a, b
    seen = exact @ lower
    vectors = _top_vectors(seen.T @ seen, rank)
    right = torch.linalg.solve_triangular(lower, vectors.T, upper=False, left=False)
    b, a = _balanced(seen @ vectors, right)
    return a, b


def _top_vectors(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors [N, R] of the largest eigenvalues, the largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(1)


def _balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B [O, R] and A [R, I] in float32 with the same product, vectors of a rank equally long."""
    lengths = (a.norm(dim=1) / b.norm(dim=0).clamp(min=torch.finfo(a.dtype).tiny)).sqrt()
    safe = lengths.where(lengths > 0, 1)
    return (b * safe).float().contiguous(), (a / safe[:, None]).float().contiguous()
