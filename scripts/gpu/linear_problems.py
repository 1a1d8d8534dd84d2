"""Random products with quantized matrices, for the correctness part.

Each width of codes meets few, some and many rows, which are different kernels, and rows of weights
that the fused kernels can and cannot read.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from gpu.case import Context
from gpu.problem import Exact, Problem
from gpu.weights import KINDS, KINDS_OF_BYTES, LEVELS, Weight, random_weight
from qtune_kernels.dequantize import dequantize
from qtune_kernels.linear import linear
from qtune_kernels.linear_int8 import THRESHOLD, linear_int8
from qtune_kernels.lora import lora_linear
from qtune_kernels.quantize import absmax, encode

Make = Callable[[random.Random, Context], Problem | Exact]
# rows for each kernel: the one for few, those for some, dequantize and multiply
ROWS = {"few": (1, 16), "some": (17, 256), "many": (257, 700)}
QUICK_ROWS = {"few": (1, 8), "some": (17, 20), "many": (21, 30)}
FLOATS = (torch.bfloat16, torch.float16)
RANK = 16


def _shape(rng: random.Random, context: Context, readable: bool) -> tuple[int, int]:
    """O odd; I a multiple of 512, which all kernels read, or odd."""
    most = 70 if context.quick else 1500
    width = 512 if context.quick else 512 * rng.randint(1, 5)
    return rng.randint(1, most) | 1, width if readable else width + rng.randint(1, 60) | 1


def _rows(rng: random.Random, context: Context, kind: str) -> int:
    return rng.randint(*(QUICK_ROWS if context.quick else ROWS)[kind])


def _weight(
    rng: random.Random, shape: tuple[int, int], bits: int, group: int, context: Context
) -> Weight:
    """A random matrix whose scales and zero points are stored in any way there is."""
    kind = rng.choice(KINDS_OF_BYTES if bits == 8 else KINDS)
    return random_weight(shape, bits, group, context.device, kind)


def _facts(weight: Weight, x: Tensor) -> dict[str, object]:
    shape, zeros = [*x.shape[:-1], *weight.shape], weight.scales.zeros
    kinds = {
        "scales": str(weight.scales.codes.dtype),
        "zeros": str(None if zeros is None else zeros.dtype),
    }
    sizes = {"bits": weight.bits, "group_size": weight.group_size, "shape": shape}
    return sizes | kinds | _dtype(x)


def _dtype(x: Tensor) -> dict[str, str]:
    return {"dtype": str(x.dtype).removeprefix("torch.")}


def _dequantize(bits: int) -> Make:
    def make(rng: random.Random, context: Context) -> Exact:
        group = rng.choice((16, 32, 64, 100, 128, 576))
        weight = _weight(rng, _shape(rng, context, False), bits, group, context)
        dtype = rng.choice((*FLOATS, torch.float32))
        return Exact(
            lambda: dequantize(*weight.arguments, *weight.shape, dtype),
            lambda: weight.exact().to(dtype),
            _facts(weight, torch.empty(0, dtype=dtype)),
        )

    return make


def _encode(bits: int) -> Make:
    def make(rng: random.Random, context: Context) -> Exact:
        shape, group = _shape(rng, context, False), rng.choice((16, 32, 64, 100, 128, 576))
        dtype = rng.choice((*FLOATS, torch.float32))
        dense = torch.randn(shape, device=context.device).to(dtype)

        def run(dense: Tensor) -> tuple[Tensor, Tensor]:
            scales = absmax(dense, group)
            return scales, encode(dense, scales, None, LEVELS[bits], group)

        facts = {"bits": bits, "group_size": group, "shape": list(shape), **_dtype(dense)}
        return Exact(lambda: run(dense), lambda: run(dense.cpu()), facts)

    return make


def _linear(bits: int, kind: str, readable: bool) -> Make:
    def make(rng: random.Random, context: Context) -> Problem:
        group = rng.choice((64, 128) if readable else (16, 32, 64, 256))
        shape = _shape(rng, context, readable)
        weight = _weight(rng, shape, bits, group, context)
        dense, dtype = weight.exact(), rng.choice(FLOATS)
        size = {"device": context.device, "dtype": dtype}
        x = torch.randn(_rows(rng, context, kind), shape[1], **size)
        inputs = (x, torch.randn(shape[0], **size)) if rng.random() < 0.5 else (x,)

        def op(x: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x, *weight.arguments, shape[0], bias)

        def plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
            return dense_linear(x, dense.to(x.dtype), bias)

        return Problem(op, plain, inputs, _facts(weight, x))

    return make


def _lora(kind: str) -> Make:
    def make(rng: random.Random, context: Context) -> Problem:
        shape = _shape(rng, context, rng.random() < 0.8)
        weight = _weight(rng, shape, rng.choice(list(LEVELS)), 64, context)
        dense, scaling = weight.exact(), rng.choice((0.5, 2.0))
        size = {"device": context.device, "dtype": rng.choice(FLOATS)}
        x = torch.randn(2, _rows(rng, context, kind), shape[1], **size)
        a = torch.randn(RANK, shape[1], device=context.device) / 20
        b = torch.randn(shape[0], RANK, device=context.device) / 20

        def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return lora_linear(x, *weight.arguments, shape[0], None, a, b, scaling)

        def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            update = x @ a.to(x.dtype).T @ b.to(x.dtype).T
            return x @ dense.to(x.dtype).T + scaling * update

        return Problem(op, plain, (x, a, b), _facts(weight, x))

    return make


def _int8(kind: str) -> Make:
    def make(rng: random.Random, context: Context) -> Problem:
        shape = _shape(rng, context, True)
        group = rng.choice((64, shape[1]))
        weight = random_weight(shape, 8, group, context.device)
        size = {"device": context.device, "dtype": rng.choice(FLOATS)}
        x = torch.randn(_rows(rng, context, kind), shape[1], **size)
        x[0, rng.randrange(shape[1])] = 50.0

        def op(x: Tensor) -> Tensor:
            return linear_int8(x, *weight.arguments[:5], group, shape[0], None)

        def plain(x: Tensor) -> Tensor:
            return _rounded(x) @ weight.exact().to(x.dtype).T

        return Problem(op, plain, (x,), _facts(weight, x))

    return make


def _rounded(x: Tensor) -> Tensor:
    """x as 8 bits a row hold it, outlier columns as they are; its gradient is that of x."""
    held = x.detach().float()
    outliers = (held.abs() > THRESHOLD).any(0)
    largest = held.abs().masked_fill(outliers, 0).amax(1, keepdim=True)
    steps = (held * (127 / largest)).round().to(x.dtype) * (largest.to(x.dtype) / 127)
    return x + torch.where(outliers, 0, steps - x.detach())


def _makers() -> dict[str, Make]:
    made: dict[str, Make] = {}
    for bits in LEVELS:
        made[f"quantize, {bits} bits"] = _encode(bits)
        made[f"dequantize, {bits} bits"] = _dequantize(bits)
        for kind in ROWS:
            made[f"linear, {bits} bits, {kind} rows"] = _linear(bits, kind, True)
        made[f"linear, {bits} bits, odd width"] = _linear(bits, "some", False)
    for kind in ROWS:
        made[f"lora_linear, {kind} rows"] = _lora(kind)
        made[f"linear_int8, {kind} rows"] = _int8(kind)
    return made


MAKERS = _makers()
