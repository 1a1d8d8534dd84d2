"""Words of the code book E8P -> weights, eight words at a time (`e8p_book.py` has their meaning).

A look-up by eight bits gives the magnitudes of eight numbers as bytes, from a table of 2 KB that
stays in the first-level cache. Signs are bits already, in the order of the numbers, so those of
eight words are one mask for 64 bytes.
"""

from functools import cache

import torch
from torch import Tensor

from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, available, kernel
from qtune_kernels.cpu.processor import features
from qtune_kernels.cpu.simd import BF16, F32, I1, I8, I16, I32, I64, LANES, Code, Value, vector
from qtune_kernels.e8p_book import LENGTH, STEP, points

KINDS = {torch.float32: F32, torch.bfloat16: BF16}
# words decoded at a time, and the weights that they are
WORDS = 8
WEIGHTS = WORDS * LENGTH
QUADS = vector(I64, WORDS)
# the same in each of eight bytes
ONES = 0x0101010101010101
MINUS_ONES = -1


def dequantizes(flat: Tensor) -> bool:
    """Whether `dequantize_into` can fill this tensor on this machine."""
    whole = flat.numel() % WEIGHTS == 0
    return whole and flat.is_cpu and flat.dtype in KINDS and available() and _has_bytes()


def dequantize_into(flat: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Write the weights of words into `flat`, [weights], float32 or bf16; scale is float32 [1]."""
    step = float(scale.float() * STEP)
    _dequantize(
        flat.data_ptr(),
        flat.numel() // WEIGHTS,
        packed.data_ptr(),
        magnitudes().data_ptr(),
        step,
        dtype=flat.dtype,
    )


@kernel
def _dequantize(
    code: KernelCode,
    weights: Pointer,
    count: Integer,
    packed: Pointer,
    table: Pointer,
    step: Number,
    *,
    dtype: torch.dtype,
) -> None:
    steps = code.spread(step)
    with code.share(count) as index:
        numbers = decoded(code, packed + index * (2 * WORDS), table)
        for part in range(0, WEIGHTS, LANES):
            piece = numbers.shuffle(numbers, range(part, part + LANES)).signed_to(F32)
            target = weights + (index * WEIGHTS + part) * dtype.itemsize
            code.write(piece * steps, target, KINDS[dtype])


def decoded(code: Code, words: Value, table: Value) -> Value:
    """The 64 numbers of eight words at an address, in steps, int8."""
    word = code.load(words, vector(I16, WORDS)).to(I64)
    pattern = _gather(code, table, word & 0xFF)
    signs = word >> 8 & 0x7F
    # the last sign makes the sum even; of magnitudes the lowest bit says whether it is odd
    odd = code.call("llvm.ctpop.v8i64", QUADS, signs) ^ pattern
    signs = signs | (odd & 1) << 7
    negative = signs.to(I8).bits(vector(I1, WEIGHTS))
    magnitude = (pattern & ~1).bits(vector(I8, WEIGHTS))
    shifts = code.value(ONES, QUADS), code.value(MINUS_ONES, QUADS)
    shift = code.select((word >> 15).equals(0), *shifts).bits(vector(I8, WEIGHTS))
    return code.select(negative, -magnitude, magnitude) + shift


def _gather(code: Code, table: Value, index: Value) -> Value:
    """Eight int64 of a table."""
    every, size = code.value(1, vector(I1, WORDS)), code.value(8, I32)
    name = "llvm.x86.avx512.mask.gather.qpq.512"
    return code.call(name, QUADS, code.value(0, QUADS), table, index, every, size)


@cache
def magnitudes() -> Tensor:
    """Magnitudes by pattern, int64 [256] of eight int8, in steps; bit 0: whether their sum is odd.

    Taken from the points whose signs are all plus but for the last, which shows the parity.
    """
    with torch.inference_mode(False):
        shown = points(torch.device("cpu"))[:256].view(torch.int8).view(-1, LENGTH) - 1
        made = shown.abs()
        made[:, 0] |= shown[:, -1] < 0
        return made.view(torch.int64).view(-1).clone()


def _has_bytes() -> bool:
    return {"avx512bw", "avx512dq"} <= features()
