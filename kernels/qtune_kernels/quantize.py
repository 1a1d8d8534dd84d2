"""Weights -> scales of groups, and codes: the nearest level to each weight over its scale.

Groups run over the flat matrix. The roundings are those of bitsandbytes (QLoRA, arXiv 2305.14314),
so NF4 and FP4 codes are the same there and here: a weight is multiplied by the reciprocal of its
scale, and a ratio halfway between two levels takes the lower one. Eight-bit codes are the nearest
integers to 127 times the ratio, by a division, since there codes are chosen for stored scales, for
which the reciprocal's rounding would show.

There are two ops because scales are stored in 8 bits in between, and some formats choose codes for
what is stored. Both read the weight in slices and need little memory besides their result. On the
CPU the search among levels is a look-up (nearest.py). The kernels for CUDA are in
quantize_triton.py.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qtune_kernels.nearest import SMALLEST_SCALE, cells_of
from qtune_kernels.packing import code_bits, pack, packed_bytes, run_weights
from qtune_kernels.scratch import scratch, scratch_like

# weights done at a time on the CPU: their float32 ratios, 1 MB, stay in the second-level cache
SLICE = 1 << 18


@torch.library.custom_op("qtune::absmax", mutates_args=())
def absmax(weight: Tensor, group_size: int) -> Tensor:
    """The largest magnitude of each group, float32 [groups], of a weight of any float dtype."""
    flat = weight.reshape(-1)
    largest = flat.new_empty(num_groups(flat.numel(), group_size), dtype=torch.float32)
    for part, groups in _slices(flat, group_size, group_size):
        largest[groups] = _by_groups(part, group_size).abs_().amax(1)
    return largest


@absmax.register_fake
def _(weight: Tensor, group_size: int) -> Tensor:
    return weight.new_empty(num_groups(weight.numel(), group_size), dtype=torch.float32)


@absmax.register_kernel("cuda")
def _(weight: Tensor, group_size: int) -> Tensor:
    from qtune_kernels import quantize_triton

    return quantize_triton.absmax(weight, group_size)


@torch.library.custom_op("qtune::encode", mutates_args=())
def encode(weight: Tensor, scales: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    """Storage bytes (`packing.pack`) of a weight of any float dtype, scales float32 [groups].

    `levels` as in `dequantize`, in any order and at most two of a kind. On the CPU, raises
    ValueError for a scale that is not finite, which is that of a group with such weights.
    """
    flat, bits = weight.reshape(-1), code_bits(levels)
    packed = flat.new_empty(packed_bytes(flat.numel(), bits), dtype=torch.uint8)
    if not scales.isfinite().all():
        raise ValueError("a scale is not finite: the weight holds infinities or NaN")
    first = 0
    for part, groups in _slices(flat, group_size, run_weights(bits)):
        weights, own = _by_groups(part, group_size), scales[groups].unsqueeze(1)
        codes = _nearest(weights, own, tuple(levels))
        stored = pack(codes.view(-1)[: part.numel()], bits)
        packed[first : first + stored.numel()] = stored
        first += stored.numel()
    return packed


@encode.register_fake
def _(weight: Tensor, scales: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    size = packed_bytes(weight.numel(), code_bits(levels))
    return weight.new_empty(size, dtype=torch.uint8)


@encode.register_kernel("cuda")
def _(weight: Tensor, scales: Tensor, levels: Sequence[float], group_size: int) -> Tensor:
    from qtune_kernels import quantize_triton

    return quantize_triton.encode(weight, scales, levels, group_size)


def num_groups(num_weights: int, group_size: int) -> int:
    """Groups of a weight, of which the last may be short."""
    return -(-num_weights // group_size)


def _slices(flat: Tensor, group_size: int, run: int) -> Iterator[tuple[Tensor, slice]]:
    """Parts of a weight that begin with a group and a run, and the numbers of their groups."""
    whole = math.lcm(group_size, run)
    step = -(-SLICE // whole) * whole
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        first = start // group_size
        yield part, slice(first, first + num_groups(part.numel(), group_size))


def _by_groups(part: Tensor, group_size: int) -> Tensor:
    """Groups [S, G] of a slice in a float32 buffer, the last one filled up with zeros."""
    size = num_groups(part.numel(), group_size) * group_size
    if part.is_cpu:
        groups = scratch("groups", size, torch.float32)
    else:
        groups = part.new_empty(size, dtype=torch.float32)
    groups[: part.numel()] = part
    groups[part.numel() :] = 0
    return groups.view(-1, group_size)


def _nearest(groups: Tensor, scales: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Codes, uint8 [S, G], of float32 groups [S, G], which are overwritten, and scales [S, 1]."""
    if not levels:
        ratios = groups.div_(scales.where(scales != 0, 1))
        return ratios.mul_(127).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    ratios = groups.mul_(1 / scales.where(scales.abs() > SMALLEST_SCALE, SMALLEST_SCALE))
    cells = cells_of(levels, groups.device)
    ratios = ratios.clamp_(min(levels), max(levels)).view(-1)
    cell = scratch_like(ratios, "cell", torch.int32)
    bound = scratch_like(ratios, "bound", torch.float32)
    above = scratch_like(ratios, "above", torch.bool)
    cell.copy_(cells.places(ratios, bound))
    torch.index_select(cells.bounds, 0, cell, out=bound)
    torch.gt(ratios, bound, out=above)
    return cells.codes.index_select(0, cell.mul_(2).add_(above))
