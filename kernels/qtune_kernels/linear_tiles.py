"""Which kernel multiplies: the switch between fused kernels and dequantizing, by a table per GPU.

For few rows the fused kernels decode the weight inside the product. For many, dequantizing once
and the vendor's GEMM win, because decoding inside the product is repeated by every row of tiles.
Where the switch lies, and the tiles before it, are entries of tuning/*.json (tile_tables.py).
Whatever a table says, the fused kernels read only what they can: 16-bit rows of x, rows of W that
are cut into whole tiles of packed codes, and segments of 64 weights with one scale each.
"""

import sys
from functools import cache, lru_cache

import torch

from qtune_kernels.packing import SEGMENT, TILE_SEGMENTS
from qtune_kernels.tile_tables import Tile, table_of

__all__ = ["Tile", "backward_tile", "forward_tile", "most_fused_rows", "num_parts"]


def forward_tile(
    num_rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    group_size: int,
    bits: int,
    device: torch.device | None = None,
) -> Tile | None:
    """The tile of a fused y = x W^T for W of `shape` (O, I), or None: dequantize and multiply."""
    if not _readable(num_rows, shape, dtype, group_size, bits):
        return None
    return _tile(device, "forward", bits, num_rows, shape)


def backward_tile(
    num_rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    group_size: int,
    bits: int,
    device: torch.device | None = None,
) -> Tile | None:
    """The tile of a fused dx = dy W for W of `shape` (O, I), or None: dequantize and multiply."""
    if not _readable(num_rows, shape, dtype, group_size, bits):
        return None
    return _tile(device, "backward", bits, num_rows, shape)


@cache
def most_fused_rows(device: torch.device) -> int:
    """With more rows than that, `forward_tile` is None for every weight."""
    entries = table_of(device).entries
    fused = [e.most_rows for e in entries if e.kind == "forward" and e.tile is not None]
    return max((sys.maxsize if rows is None else rows for rows in fused), default=0)


def num_parts(num_programs: int, num_steps: int, device: torch.device | None = None) -> int:
    """Into how many parts a sum of that many steps is split, given the number of output tiles."""
    table = table_of(device)
    enough = -(-table.programs // num_programs)
    wanted = min(table.max_parts, enough, max(1, num_steps // 4))
    steps_a_part = -(-num_steps // wanted)
    return -(-num_steps // steps_a_part)


# a model has few shapes, and going through a table takes longer than launching a kernel
@lru_cache(maxsize=4096)
def _tile(
    device: torch.device | None, kind: str, bits: int, num_rows: int, shape: tuple[int, int]
) -> Tile | None:
    return table_of(device).tile(kind, bits, num_rows, shape)


def _readable(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, group_size: int, bits: int
) -> bool:
    """Whether rows of W are whole tiles, and the segments in them have one scale each."""
    whole_tiles = shape[1] % (TILE_SEGMENTS[bits] * SEGMENT) == 0
    one_scale = group_size % SEGMENT == 0
    return whole_tiles and one_scale and dtype in (torch.bfloat16, torch.float16) and num_rows > 0
