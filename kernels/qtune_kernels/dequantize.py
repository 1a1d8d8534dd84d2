"""Codes -> weights, in one pass over the storage.

Differences and products are taken in float32 and rounded once each, so every device gives the same
bits. On the CPU the work goes through buffers small enough for the second-level cache; the kernel
for CUDA is in dequantize_triton.py, which is imported with the first CUDA tensor because importing
Triton takes longer than everything else here.

Groups may be of any size. Neighbours that lie in one segment and in one group are a unit: a whole
segment where groups are made of segments, and less, down to single weights, elsewhere.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.packing import RUN_SEGMENTS, SEGMENT, code_bits
from qtune_kernels.scales import Scales, dequantize_scales, unpack_zeros
from qtune_kernels.scratch import scratch_like

# weights done at a time on the CPU: the float32 products of a segment of each run, 1 MB or less,
# stay in the second-level cache, and the cost of starting each step is spread over many
CHUNK = 1 << 19


class Codes(NamedTuple):
    """A quantized matrix [O, I]: the arguments of `dequantize`."""

    packed: Tensor
    scales: Scales
    levels: Sequence[float]
    group_size: int
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """Of a code."""
        return code_bits(self.levels)


@torch.library.custom_op("qtune::dequantize", mutates_args=())
def dequantize(
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights [O, I] in `dtype` of storage bytes (`packing.pack`) and what groups share (`Scales`).

    A code stands for its entry in `levels`, whose number (16, 8 or 4) tells the bits; where
    `levels` is empty, codes have 8 bits and stand for code - 128. A weight is that, less the zero
    point of its group if there are any, times the scale of its group.
    """
    flat = packed.new_empty(stored_weights(packed, levels), dtype=dtype)
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    dequantize_into(flat, packed, scales, levels, group_size)
    return flat[: out_features * in_features].view(out_features, in_features)


@dequantize.register_fake
def _(
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(out_features, in_features, dtype=dtype)


@dequantize.register_kernel("cuda")
def _(
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    from qtune_kernels import dequantize_triton

    weights = packed.new_empty(out_features, in_features, dtype=dtype)
    scales = Scales(scale_codes, scale_scales, scale_offset, zeros)
    dequantize_triton.dequantize_into(weights.view(-1), packed, scales, levels, group_size)
    return weights


def stored_weights(packed: Tensor, levels: Sequence[float]) -> int:
    """Number of weights that `packed` has room for, the filling at its end included."""
    return packed.numel() * 8 // code_bits(levels)


def dequantize_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """Write the weights into `flat`, [stored_weights] of any float dtype.

    By the kernel of cpu/dequantize.py where the processor runs it; both give the same bits.
    """
    if flat.is_cpu:
        from qtune_kernels.cpu import dequantize as native

        if native.dequantizes(flat, scales, tuple(levels), group_size):
            native.dequantize_into(flat, packed, scales, tuple(levels), group_size)
            return
    plain_into(flat, packed, scales, levels, group_size)


def plain_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """What `dequantize_into` does, with plain PyTorch."""
    shared = _Shared(dequantize_scales(scales), None)
    if scales.zeros is not None:
        num_groups = scales.codes.numel()
        shared = shared._replace(zeros=unpack_zeros(scales.zeros, code_bits(levels), num_groups))
    if levels:
        _dequantize_levels(flat, packed, shared, tuple(levels), group_size)
    else:
        _dequantize_8bit(flat, packed, shared, group_size)


class _Shared(NamedTuple):
    """What groups, units or weights have: float32 scales, and zero points of the same shape."""

    scales: Tensor
    zeros: Tensor | None

    def by_units(self, weights: Tensor, group_size: int) -> "_Shared":
        """The same for each unit of `weights` [..., unit], shape [..., 1]."""
        zeros = None if self.zeros is None else _by_units(self.zeros, weights, group_size)
        return _Shared(_by_units(self.scales, weights, group_size), zeros)

    def part(self, *index: int | slice) -> "_Shared":
        """Some of them."""
        zeros = None if self.zeros is None else self.zeros[index]
        return _Shared(self.scales[index], zeros)

    def decode_(self, levels: Tensor) -> Tensor:
        """Make weights of the levels, in place."""
        if self.zeros is not None:
            levels.sub_(self.zeros)
        return levels.mul_(self.scales)


def _by_units(of_groups: Tensor, weights: Tensor, group_size: int) -> Tensor:
    *shape, unit = weights.shape
    of_units = of_groups
    if group_size > unit:
        of_units = of_units.repeat_interleave(group_size // unit)
    num_units = weights.numel() // unit
    if of_units.numel() < num_units:
        of_units = pad(of_units, (0, num_units - of_units.numel()))
    return of_units[:num_units].view(*shape, 1)


def _dequantize_levels(
    flat: Tensor, packed: Tensor, shared: _Shared, levels: tuple[float, ...], group_size: int
) -> None:
    """Codes that share bytes: one segment of each run after the other, two codes at a time."""
    bits = code_bits(levels)
    num_segments, unit = RUN_SEGMENTS[bits], gcd(group_size, SEGMENT)
    weights = flat.view(-1, num_segments, SEGMENT // unit, unit)
    of_units = shared.by_units(weights, group_size)
    words = packed.view(torch.uint16).view(weights.shape[0], -1, SEGMENT // 2).transpose(0, 1)
    for start in range(0, weights.shape[0], CHUNK // (num_segments * SEGMENT)):
        chunk = slice(start, start + CHUNK // (num_segments * SEGMENT))
        tiles = scratch_like(words[:, chunk], "tiles", torch.int32).copy_(words[:, chunk])
        pairs = scratch_like(tiles[0], "products", torch.int64).view(-1)
        products = pairs.view(torch.float32).view(-1, SEGMENT // unit, unit)
        for segment in range(num_segments):
            index, shift = _pair_index(tiles, bits, segment)
            table = _pair_table(levels, packed.device, shift)
            torch.index_select(table, 0, index, out=pairs)
            weights[chunk, segment] = of_units.part(chunk, segment).decode_(products)


def _pair_index(tiles: Tensor, bits: int, segment: int) -> tuple[Tensor, int]:
    """Two codes of a segment for each int32 of `tiles`, and the shift at which they stand in it.

    int32 [P]; the codes are 8 bits apart.
    """
    index = scratch_like(tiles[0], "index", torch.int32).view(-1)
    if bits != 3:
        shift = bits * segment
        torch.bitwise_and(tiles.view(-1), _both((1 << bits) - 1) << shift, out=index)
        return index, shift
    high = scratch_like(index, "high", torch.int32)
    torch.bitwise_right_shift(tiles[segment // 4].view(-1), segment % 4 * 2, out=index)
    torch.bitwise_right_shift(tiles[2].view(-1), segment, out=high)
    return index.bitwise_and_(_both(3)).add_(high.bitwise_and_(_both(1)), alpha=4), 0


def _both(code: int) -> int:
    """A number with the same code in its two bytes."""
    return code | code << 8


@cache
def _pair_table(levels: tuple[float, ...], device: torch.device, shift: int) -> Tensor:
    """The float32 levels of the codes at `shift` and `shift` + 8 of an index, two in an int64.

    Two weights cost one look-up. Of the entries only the few that a mask leaves are ever met, so
    they are soon back in the first-level cache after a matrix product has filled it.
    """
    largest = len(levels) - 1
    with torch.inference_mode(False):
        level = torch.tensor(levels, dtype=torch.float32, device=device)
        index = torch.arange((_both(largest) << shift) + 1, device=device)
        codes = index >> shift & largest, index >> shift + 8 & largest
        return torch.stack([level[code] for code in codes], 1).view(torch.int64).view(-1)


def _dequantize_8bit(flat: Tensor, packed: Tensor, shared: _Shared, group_size: int) -> None:
    """Byte codes; a last unit that is not full is done by itself."""
    unit = gcd(group_size, SEGMENT)
    whole = packed.numel() // unit
    weights = flat[: whole * unit].view(whole, unit)
    codes = packed[: whole * unit].view(whole, unit)
    of_units = shared.by_units(weights, group_size)
    for start in range(0, whole, CHUNK // unit):
        chunk = slice(start, start + CHUNK // unit)
        _decode_bytes(weights[chunk], codes[chunk], of_units.part(chunk))
    if whole * unit < packed.numel():
        rest = slice(whole * unit, None)
        _decode_bytes(flat[rest], packed[rest], shared.part(slice(-1, None)))


def _decode_bytes(weights: Tensor, codes: Tensor, shared: _Shared) -> None:
    levels = scratch_like(codes, "products", torch.float32)
    weights.copy_(shared.decode_(levels.copy_(codes).sub_(128)))
