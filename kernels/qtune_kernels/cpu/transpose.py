"""A tall matrix lying down, [T, R] -> [R, T]: the left factor of a sum over rows."""

from torch import Tensor

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.gemm import PAIRS, WORDS
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.simd import I64
from qtune_kernels.cpu.tiles import DEPTH, HIGH_PAIRS, LOW_PAIRS, SIDE


@kernel
def _transpose(
    code: KernelCode,
    out: Pointer,
    tall: Pointer,
    stride: Integer,
    num_rows: Integer,
    rank: Integer,
) -> None:
    with code.share(num_rows // DEPTH) as block, code.loop(rank, 0, DEPTH) as first:
        live = code.constants(range(DEPTH), I64) < code.spread(rank - first, DEPTH)
        start = tall + block * DEPTH * stride + first * 2
        rows = [code.load(start + stride * row, WORDS, live) for row in range(DEPTH)]
        for half, lanes in enumerate((LOW_PAIRS, HIGH_PAIRS)):
            # element r of two neighbouring rows side by side, as one of 16 int32
            pairs = [rows[i].shuffle(rows[i + 1], lanes) for i in range(0, DEPTH, 2)]
            for i, column in enumerate(tiles.transpose([pair.bits(PAIRS) for pair in pairs])):
                at = num_rows * (first + (SIDE * half + i)) + block * DEPTH
                code.store(column, out + at * 2)


def lying(tall: Tensor) -> Tensor:
    """The transposed of bf16 [T, R], with rows of zeros up to a multiple of 32 of them.

    T is a multiple of 32, and elements of a row of `tall` lie side by side.
    """
    num_rows, rank = tall.shape
    out = tall.new_empty(-(-rank // DEPTH) * DEPTH, num_rows)
    _transpose(out.data_ptr(), tall.data_ptr(), tall.stride(0) * 2, num_rows, rank)
    return out
