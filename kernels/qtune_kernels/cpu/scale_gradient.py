"""The CPU kernel of `scale_gradient`: tiles of dW by AMX, reduced while they are in a cache.

Entries of dW are float32 sums that are never rounded, and levels are decoded in registers next to
the entries they are multiplied with: all that is written of a tile is its part of two vectors.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.cpu.coded import level_table
from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.groups import Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, kernel
from qtune_kernels.cpu.product import multiplies, product
from qtune_kernels.cpu.simd import F32, LANES, vector
from qtune_kernels.cpu.tiles import DEPTH
from qtune_kernels.cpu.transpose import lying
from qtune_kernels.packing import code_bits
from qtune_kernels.scratch import scratch

# entries of dW in a tile, 8 MB: for each tile the product arranges all of x once more
TILE = 1 << 21
# rows of a tile are made of whole groups, of which larger ones would need too many
MOST_ROWS = 512


def takes(dy: Tensor, x: Tensor, group_size: int) -> bool:
    """Whether `scale_gradient` can do these rows [T, O] and [T, I] on this machine."""
    if group_size % LANES or _row_step(x.shape[1], group_size) > MOST_ROWS:
        return False
    # rows may be missing, which are added as zeros
    side_by_side = dy.stride(1) == 1 and dy.dtype == x.dtype
    return side_by_side and len(x) > 0 and multiplies(dy, x[:0])


def scale_gradient(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    """The sums of dW * level and of dW = dy^T x over each group, float32 [S]."""
    missing = -len(x) % DEPTH
    if missing:
        dy, x = (pad(rows, (0, 0, 0, missing)) for rows in (dy, x))
    out_features, in_features = dy.shape[1], x.shape[1]
    num_groups = -(-out_features * in_features // group_size)
    of_levels = dy.new_empty(num_groups, dtype=torch.float32)
    of_weights = torch.empty_like(of_levels)
    step = _rows_of_tile(in_features, group_size)
    for row in range(0, out_features, step):
        left = lying(dy[:, row : row + step])
        tile = scratch("gradient", len(left) * in_features, torch.float32).view(-1, in_features)
        product(left, x, outputs_first=False, dtype=torch.float32, out=tile)
        stop = min(row + step, out_features)
        first = row * in_features // group_size
        _sum_groups(
            of_levels.data_ptr(),
            of_weights.data_ptr(),
            tile.data_ptr(),
            first,
            -(-stop * in_features // group_size) - first,
            stop * in_features,
            packed.data_ptr(),
            level_table(tuple(levels)).data_ptr(),
            layout=Layout(code_bits(levels), group_size, torch.float32, None),
        )
    return of_levels, of_weights


@kernel
def _sum_groups(
    code: KernelCode,
    of_levels: Pointer,
    of_weights: Pointer,
    tile: Pointer,
    first: Integer,
    num_groups: Integer,
    stop: Integer,
    packed: Pointer,
    levels: Pointer,
    *,
    layout: Layout,
) -> None:
    """Groups from `first` on, of which the tile holds the entries of weights up to `stop`."""
    nothing, size = levels, layout.group_size
    places = Places(packed, nothing, nothing, nothing, nothing, nothing, levels, num_groups)
    matrix = Packed(code, places, layout)
    step = gcd(size, DEPTH)
    with code.share(num_groups) as number:
        group, zero = first + number, code.value(0.0, vector(F32))
        totals = [code.variable(zero) for _ in range(2)]
        with code.loop(code.smaller((group + 1) * size, stop), group * size, step) as at:
            for part, level in enumerate(matrix.levels(at, step // LANES)):
                place = tile + (at - first * size + LANES * part) * 4
                entry = code.load(place, vector(F32))
                totals[0].set(code.fma(entry, level, totals[0].get()))
                totals[1].set(totals[1].get() + entry)
        for target, total in zip((of_levels, of_weights), totals, strict=True):
            code.store(code.sum(total.get()), target + group * 4)


def _row_step(in_features: int, group_size: int) -> int:
    """Rows that are made of whole groups."""
    return group_size // gcd(group_size, in_features)


@cache
def _rows_of_tile(in_features: int, group_size: int) -> int:
    step = _row_step(in_features, group_size)
    # whole blocks of the product as well
    step *= DEPTH // gcd(step, DEPTH)
    return max(1, TILE // (in_features * step)) * step
