"""Codes -> weights, in one pass over the storage.

Products are taken in float32 and rounded once, so every device gives the same bits. On the CPU the
work goes through buffers small enough for the second-level cache; the kernel for CUDA is in
dequantize_triton.py, which is imported with the first CUDA tensor because importing Triton takes
longer than everything else here.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.packing import RUN_SEGMENTS, SEGMENT, code_bits
from qtune_kernels.scales import Scales, dequantize_scales
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
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights [O, I] in `dtype` of storage bytes (`packing.pack`) and scales (`scales.Scales`).

    A code stands for its entry in `levels`, whose number (16, 8 or 4) tells the bits; where
    `levels` is empty, codes have 8 bits and stand for (code - 128) / 127. A weight is that times
    the scale of its group.
    """
    flat = packed.new_empty(stored_weights(packed, levels), dtype=dtype)
    scales = Scales(scale_codes, scale_scales, scale_offset)
    dequantize_into(flat, packed, scales, levels, group_size)
    return flat[: out_features * in_features].view(out_features, in_features)


@dequantize.register_fake
def _(
    packed: Tensor,
    scale_codes: Tensor,
    scale_scales: Tensor,
    scale_offset: Tensor,
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
    levels: Sequence[float],
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    from qtune_kernels import dequantize_triton

    weights = packed.new_empty(out_features, in_features, dtype=dtype)
    scales = Scales(scale_codes, scale_scales, scale_offset)
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

        if native.dequantizes(flat):
            native.dequantize_into(flat, packed, scales, tuple(levels), group_size)
            return
    plain_into(flat, packed, scales, levels, group_size)


def plain_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """What `dequantize_into` does, with plain PyTorch."""
    if levels:
        _dequantize_levels(flat, packed, dequantize_scales(scales), tuple(levels), group_size)
    else:
        _dequantize_8bit(flat, packed, dequantize_scales(scales), group_size)


def _dequantize_levels(
    flat: Tensor, packed: Tensor, scales: Tensor, levels: tuple[float, ...], group_size: int
) -> None:
    """Codes that share bytes: one segment of each run after the other, two codes at a time."""
    bits = code_bits(levels)
    num_segments, unit = RUN_SEGMENTS[bits], min(group_size, SEGMENT)
    weights = flat.view(-1, num_segments, SEGMENT // unit, unit)
    unit_scales = _unit_scales(scales, group_size, weights)
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
            weights[chunk, segment] = products.mul_(unit_scales[chunk, segment])


def _unit_scales(scales: Tensor, group_size: int, weights: Tensor) -> Tensor:
    """Scales, float32 [runs, segments, units, 1], of `weights` [runs, segments, units, unit]."""
    *shape, unit = weights.shape
    if group_size > unit:
        scales = scales.repeat_interleave(group_size // unit)
    num_units = weights.numel() // unit
    if scales.numel() < num_units:
        scales = pad(scales, (0, num_units - scales.numel()))
    return scales[:num_units].view(*shape, 1)


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


def _dequantize_8bit(flat: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> None:
    """Byte codes; a last group that is not full is done by itself."""
    steps = (scales / 127).unsqueeze(1)
    whole = packed.numel() // group_size * group_size
    for start in range(0, whole, max(CHUNK, group_size)):
        chunk = slice(start, min(start + max(CHUNK, group_size), whole))
        groups = slice(chunk.start // group_size, chunk.stop // group_size)
        codes = packed[chunk].view(-1, group_size)
        _scale_codes(flat[chunk].view(-1, group_size), codes, steps[groups])
    if whole < packed.numel():
        _scale_codes(flat[whole:].unsqueeze(0), packed[whole:].unsqueeze(0), steps[-1:])


def _scale_codes(weights: Tensor, codes: Tensor, steps: Tensor) -> None:
    """Write (codes - 128) * steps, [groups, G]."""
    products = scratch_like(codes, "products", torch.float32)
    weights.copy_(products.copy_(codes).sub_(128).mul_(steps))
