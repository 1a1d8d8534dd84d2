"""What the gradients of scales and zero points need, without a gradient of the weight.

A weight is (level - zero) * scale, so with dW = dy^T x the gradient of a group's scale is the sum
of dW (level - zero) over the group, and that of its zero point -scale times the sum of dW. Both
follow from two sums, of dW * level and of dW, which are taken while a tile of dW is in the cache
(or, on CUDA, in registers: scale_gradient_triton.py). Memory is that of one tile.

On a CPU a tile is a product in the dtype of x: what is lost there is 2^-9 (bf16) of each entry, as
in the gradients of adapters. Sums over groups are float32 and taken in a fixed order, so results
repeat bit for bit.
"""

from collections.abc import Iterator, Sequence
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.dequantize import dequantize_into, stored_weights
from qtune_kernels.packing import SEGMENT, code_bits, packed_bytes, run_weights
from qtune_kernels.scales import Scales
from qtune_kernels.scratch import scratch

# entries of dW in a tile, 2 MB in float32, and rows of which it has a multiple: smaller ones spend
# more time in starting products than they save in the cache
TILE, LEAST_ROWS = 1 << 19, 64


@torch.library.custom_op("qtune::scale_gradient", mutates_args=())
def scale_gradient(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    """The sums of dW * level and of dW = dy^T x over each group, both float32 [S].

    Of dy [..., O] and x [..., I]; for the codes' arguments see `dequantize`.
    """
    return plain(_rows(dy), _rows(x), packed, levels, group_size)


@scale_gradient.register_fake
def _(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    num_groups = -(-dy.shape[-1] * x.shape[-1] // group_size)
    of_levels = dy.new_empty(num_groups, dtype=torch.float32)
    return of_levels, torch.empty_like(of_levels)


@scale_gradient.register_kernel("cpu")
def _(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    from qtune_kernels.cpu import scale_gradient as native

    if native.takes(_rows(dy), _rows(x), group_size):
        return native.scale_gradient(_rows(dy), _rows(x), packed, levels, group_size)
    return plain(_rows(dy), _rows(x), packed, levels, group_size)


@scale_gradient.register_kernel("cuda")
def _(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    from qtune_kernels import scale_gradient_triton

    if scale_gradient_triton.takes(dy, x, group_size):
        return scale_gradient_triton.scale_gradient(_rows(dy), _rows(x), packed, levels, group_size)
    return plain(_rows(dy), _rows(x), packed, levels, group_size)


def plain(
    dy: Tensor, x: Tensor, packed: Tensor, levels: Sequence[float], group_size: int
) -> tuple[Tensor, Tensor]:
    """What `scale_gradient` returns of rows dy [T, O] and x [T, I], with plain PyTorch."""
    shape = (dy.shape[1], x.shape[1])
    num_groups = -(-shape[0] * shape[1] // group_size)
    of_levels = dy.new_zeros(num_groups, dtype=torch.float32)
    of_weights = torch.zeros_like(of_levels)
    # neighbours that lie in one row and in one group
    unit = gcd(group_size, shape[1])
    for rows in _tiles(shape, code_bits(levels)):
        gradient = _product(dy[:, rows], x)
        first = rows.start * shape[1]
        _add_units(of_weights, gradient, first, unit, group_size)
        gradient.view(-1).mul_(_levels(packed, levels, first, gradient.numel()))
        _add_units(of_levels, gradient, first, unit, group_size)
    return of_levels, of_weights


def join_units(units: Tensor, first: int, num_units: int) -> tuple[slice, Tensor]:
    """Which groups of `num_units` units these are in, and their sums in them.

    `units` [U] are sums over units, of which the first is the unit number `first` of the matrix.
    """
    start = first // num_units
    before = first - start * num_units
    padded = pad(units, (before, -(before + units.numel()) % num_units))
    sums = padded.view(-1, num_units).sum(1)
    return slice(start, start + sums.numel()), sums


def _tiles(shape: tuple[int, int], bits: int) -> Iterator[slice]:
    """Slices of rows whose codes begin with a whole byte of their own."""
    out_features, in_features = shape
    aligned = max(run_weights(bits) // gcd(run_weights(bits), in_features), LEAST_ROWS)
    step = max(TILE // in_features // aligned, 1) * aligned
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def _product(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x, float32 [O, I], on the CPU in a buffer that the next call overwrites."""
    shape = (dy.shape[1], x.shape[1])
    if dy.is_cuda and dy.itemsize == 2:
        # the one product of 16-bit numbers that hands out float32 sums
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    rounded = _buffer(dy, "rounded_gradient", shape[0] * shape[1], dy.dtype).view(shape)
    torch.mm(dy.T, x, out=rounded)
    if dy.dtype == torch.float32:
        return rounded
    return _buffer(dy, "gradient", rounded.numel(), torch.float32).view(shape).copy_(rounded)


def _levels(packed: Tensor, levels: Sequence[float], first: int, num_weights: int) -> Tensor:
    """What the codes of so many weights from `first` on stand for, float32 [num_weights].

    That is weights of one group whose scale is 1; a buffer, as above.
    """
    bits = code_bits(levels)
    start = first * bits // 8
    codes = packed[start : start + packed_bytes(num_weights, bits)]
    flat = _buffer(packed, "levels", stored_weights(codes, levels), torch.float32)
    group_size = -(-flat.numel() // SEGMENT) * SEGMENT
    none = packed.new_empty(0, dtype=torch.float32)
    scales = Scales(packed.new_ones(1, dtype=torch.float32), none, none)
    dequantize_into(flat, codes, scales, levels, group_size)
    return flat[:num_weights]


def _buffer(like: Tensor, role: str, numel: int, dtype: torch.dtype) -> Tensor:
    if like.is_cpu:
        return scratch(role, numel, dtype)
    return like.new_empty(numel, dtype=dtype)


def _add_units(sums: Tensor, tile: Tensor, first: int, unit: int, group_size: int) -> None:
    """Add the entries of a tile, of which the first is number `first`, to the sums of groups."""
    units = tile.view(-1, unit).sum(1)
    groups, joined = join_units(units, first // unit, group_size // unit)
    sums[groups] += joined


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
