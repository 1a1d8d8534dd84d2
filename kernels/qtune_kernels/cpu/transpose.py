"""A tall narrow matrix lying down, [T, R] -> [32, T]: the left factor of a sum over rows."""

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
    *,
    rank: int,
) -> None:
    live = code.constants(range(DEPTH), I64) < code.spread(code.integer(rank), DEPTH)
    with code.share(num_rows // DEPTH) as block:
        start = tall + block * DEPTH * stride
        rows = [code.load(start + stride * row, WORDS, live) for row in range(DEPTH)]
        for half, lanes in enumerate((LOW_PAIRS, HIGH_PAIRS)):
            # element r of two neighbouring rows side by side, as one of 16 int32
            pairs = [rows[i].shuffle(rows[i + 1], lanes) for i in range(0, DEPTH, 2)]
            for i, column in enumerate(tiles.transpose([pair.bits(PAIRS) for pair in pairs])):
                at = (num_rows * (SIDE * half + i) + block * DEPTH) * 2
                code.store(column, out + at)


def lying(tall: Tensor) -> Tensor:
    """The transposed of bf16 [T, R], filled up with zeros to [32, T]; T is a multiple of 32."""
    out = tall.new_empty(DEPTH, len(tall))
    _transpose(out.data_ptr(), tall.data_ptr(), tall.stride(0) * 2, len(tall), rank=tall.shape[1])
    return out
