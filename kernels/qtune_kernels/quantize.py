"""Weights -> scales of groups, and codes: the nearest level to each weight over its scale.

Groups, of any size, run over the flat matrix. The roundings are those of bitsandbytes (QLoRA, arXiv
2305.14314), so NF4 and FP4 codes are the same there and here: a weight is multiplied by the
reciprocal of its scale, and a ratio halfway between two levels takes the lower one. Eight-bit codes
are the nearest integers to the ratio, by a division, since there codes are chosen for stored
scales, for which the reciprocal's rounding would show. Where there are zero points, they are added
to the ratio.

There are two ops because scales are stored in fewer bits in between, and some formats choose codes
for what is stored. Both read the weight in slices and need little memory besides their result. In
plain PyTorch the search among levels is a look-up (nearest.py). The kernels are in cpu/encode.py
and quantize_triton.py; all give the same bytes.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from qtune_kernels.nearest import SMALLEST_SCALE, cells_of
from qtune_kernels.packing import SEGMENT, code_bits, pack, packed_bytes
from qtune_kernels.scratch import scratch, scratch_like

# weights done at a time on the CPU: their float32 ratios, 1 MB, stay in the second-level cache
SLICE = 1 << 18


@torch.library.custom_op("qtune::absmax", mutates_args=())
def absmax(weight: Tensor, group_size: int) -> Tensor:
    """The largest magnitude of each group, float32 [groups], of a weight of any float dtype."""
    flat = weight.reshape(-1)
    if group_size > SLICE:
        return torch.stack([_largest(group) for group in flat.split(group_size)])
    largest = flat.new_empty(num_groups(flat.numel(), group_size), dtype=torch.float32)
    # a slice is made of whole groups
    step = SLICE // group_size * group_size
    for start in range(0, flat.numel(), step):
        groups = _by_groups(flat[start : start + step], group_size)
        first = start // group_size
        largest[first : first + len(groups)] = groups.abs_().amax(1)
    return largest


@absmax.register_fake
def _(weight: Tensor, group_size: int) -> Tensor:
    return weight.new_empty(num_groups(weight.numel(), group_size), dtype=torch.float32)


@absmax.register_kernel("cuda")
def _(weight: Tensor, group_size: int) -> Tensor:
    from qtune_kernels import quantize_triton

    return quantize_triton.absmax(weight, group_size)


@torch.library.custom_op("qtune::encode", mutates_args=())
def encode(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Sequence[float], group_size: int
) -> Tensor:
    """Storage bytes (`packing.pack`) of a weight of any float dtype.

    `scales` and `zeros` are float32 [groups], `levels` as in `dequantize`, in any order and at most
    two of a kind. On the CPU, raises ValueError for a scale that is not finite, which is that of a
    group with such weights.
    """
    if not scales.isfinite().all():
        raise ValueError("a scale is not finite: the weight holds infinities or NaN")
    if weight.is_cpu:
        from qtune_kernels.cpu import encode as native

        if native.encodes(weight, group_size):
            return native.encode(weight, scales, zeros, tuple(levels), group_size)
    return plain_encode(weight, scales, zeros, levels, group_size)


@encode.register_fake
def _(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Sequence[float], group_size: int
) -> Tensor:
    size = packed_bytes(weight.numel(), code_bits(levels))
    return weight.new_empty(size, dtype=torch.uint8)


@encode.register_kernel("cuda")
def _(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Sequence[float], group_size: int
) -> Tensor:
    from qtune_kernels import quantize_triton

    return quantize_triton.encode(weight, scales, zeros, levels, group_size)


def plain_encode(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, levels: Sequence[float], group_size: int
) -> Tensor:
    """What `encode` returns, by plain PyTorch."""
    flat, bits = weight.reshape(-1), code_bits(levels)
    packed = flat.new_empty(packed_bytes(flat.numel(), bits), dtype=torch.uint8)
    unit, first = gcd(group_size, SEGMENT), 0
    # a slice is made of whole runs and segments
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE]
        units = _by_groups(part, unit)
        own = _groups_of_units(start, len(units), unit, group_size, flat.device)
        shifts = None if zeros is None else zeros[own].unsqueeze(1)
        codes = _nearest(units, scales[own].unsqueeze(1), shifts, tuple(levels))
        stored = pack(codes.view(-1)[: part.numel()], bits)
        packed[first : first + stored.numel()] = stored
        first += stored.numel()
    return packed


def num_groups(num_weights: int, group_size: int) -> int:
    """Groups of a weight, of which the last may be short."""
    return -(-num_weights // group_size)


def _largest(group: Tensor) -> Tensor:
    """The largest magnitude in a group of any size, float32, without a copy of all of it."""
    return torch.stack([part.abs().amax() for part in group.split(SLICE)]).amax().float()


def _groups_of_units(
    start: int, num_units: int, unit: int, group_size: int, device: torch.device
) -> Tensor:
    """The numbers of the groups in which units lie, the first one at weight `start`."""
    first = start // unit
    return torch.arange(first, first + num_units, device=device) // (group_size // unit)


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


def _nearest(
    groups: Tensor, scales: Tensor, zeros: Tensor | None, levels: tuple[float, ...]
) -> Tensor:
    """Codes, uint8 [S, G], of float32 groups [S, G], which are overwritten; the others [S, 1]."""
    if levels:
        ratios = groups.mul_(1 / scales.where(scales.abs() > SMALLEST_SCALE, SMALLEST_SCALE))
    else:
        ratios = groups.div_(scales.where(scales != 0, 1))
    if zeros is not None:
        ratios.add_(zeros)
    return _nearest_level(ratios, levels) if levels else _nearest_byte(ratios)


def _nearest_byte(ratios: Tensor) -> Tensor:
    return ratios.round_().clamp_(-127, 127).add_(128).to(torch.uint8)


def _nearest_level(ratios: Tensor, levels: tuple[float, ...]) -> Tensor:
    cells = cells_of(levels, ratios.device)
    ratios = ratios.clamp_(min(levels), max(levels)).view(-1)
    cell = scratch_like(ratios, "cell", torch.int32)
    bound = scratch_like(ratios, "bound", torch.float32)
    above = scratch_like(ratios, "above", torch.bool)
    cell.copy_(cells.places(ratios, bound))
    torch.index_select(cells.bounds, 0, cell, out=bound)
    torch.gt(ratios, bound, out=above)
    return cells.codes.index_select(0, cell.mul_(2).add_(above))
