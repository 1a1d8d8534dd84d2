"""Which kernel multiplies: the switch by the number of rows, as one small table.

Up to 16 rows the weight is the left operand and the scale goes onto the accumulator; up to 256
rows the scale goes onto the decoded weight; above that, dequantizing once and the vendor's GEMM
win, because decoding inside the product is repeated by every row of tiles. The thresholds and tile
sizes come from counting instructions in compiled kernels and a model of an H200. They have not
been measured on a GPU.
"""

from typing import NamedTuple

import torch

from qtune_kernels.packing import RUN


class Tile(NamedTuple):
    """How one program of a fused kernel is laid out."""

    rows: int
    features: int
    warps: int
    stages: int
    # the weight is the left operand, the scale on the accumulator
    few_rows: bool = False


# The first entry with at least as many rows serves. Few rows take two warps, which makes the
# compiler use mma.sync on sm_90 too: wgmma needs half as many instructions again to arrange the
# weight.
FORWARD_TILES = {
    8: Tile(8, 64, warps=2, stages=4, few_rows=True),
    16: Tile(16, 64, warps=2, stages=4, few_rows=True),
    64: Tile(64, 64, warps=4, stages=3),
    256: Tile(128, 128, warps=8, stages=3),
}
# `features` is the step of the sum over output features; a program makes one run of 128 columns
BACKWARD_TILES = {
    64: Tile(64, 64, warps=4, stages=3),
    256: Tile(128, 128, warps=8, stages=2),
}
# two programs for each multiprocessor of an H200; sums are split until there are as many
PROGRAMS = 264
MAX_PARTS = 16


def forward_tile(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, group_size: int
) -> Tile | None:
    """The tile of a fused y = x W^T for W of `shape` (O, I), or None: dequantize and multiply."""
    return _choose(FORWARD_TILES, num_rows, shape, dtype, group_size)


def backward_tile(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, group_size: int
) -> Tile | None:
    """The tile of a fused dx = dy W for W of `shape` (O, I), or None: dequantize and multiply."""
    return _choose(BACKWARD_TILES, num_rows, shape, dtype, group_size)


def num_parts(num_programs: int, num_steps: int) -> int:
    """Into how many parts a sum of that many steps is split, given the number of output tiles."""
    wanted = min(MAX_PARTS, -(-PROGRAMS // num_programs), max(1, num_steps // 4))
    steps_a_part = -(-num_steps // wanted)
    return -(-num_steps // steps_a_part)


def _choose(
    tiles: dict[int, Tile],
    num_rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    group_size: int,
) -> Tile | None:
    """The tile, if rows can be read as whole runs, and planes have one scale each."""
    whole_runs = shape[1] % RUN == 0 and group_size % (RUN // 2) == 0
    if not whole_runs or dtype not in (torch.bfloat16, torch.float16) or num_rows == 0:
        return None
    return next((tile for most, tile in tiles.items() if num_rows <= most), None)
