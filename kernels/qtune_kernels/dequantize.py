"""Codes -> weights, in one pass over the storage.

Products are taken in float32 and rounded once, so every device gives the same bits. On the CPU the
work goes through buffers small enough for the second-level cache; the kernel for CUDA is in
dequantize_triton.py, which is imported with the first CUDA tensor because importing Triton takes
longer than everything else here.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtune_kernels.packing import RUN
from qtune_kernels.scales import Scales, dequantize_scales
from qtune_kernels.scratch import scratch

HALF = RUN // 2
# weights done at a time on the CPU: the float32 products of a plane, 1 MB, stay in the second-level
# cache, and the cost of starting each step is spread over many
CHUNK = 1 << 19
# the low nibbles of two bytes
PAIR_MASK = 0x0F0F


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

    A 4-bit code stands for its entry in `levels`; where `levels` is empty, codes have 8 bits and
    stand for (code - 128) / 127. A weight is that times the scale of its group.
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
    return packed.numel() * (2 if levels else 1)


def dequantize_into(
    flat: Tensor, packed: Tensor, scales: Scales, levels: Sequence[float], group_size: int
) -> None:
    """Write the weights into `flat`, [stored_weights] of any float dtype, with plain PyTorch."""
    if levels:
        _dequantize_4bit(flat, packed, dequantize_scales(scales), tuple(levels), group_size)
    else:
        _dequantize_8bit(flat, packed, dequantize_scales(scales), group_size)


def _dequantize_4bit(
    flat: Tensor, packed: Tensor, scales: Tensor, levels: tuple[float, ...], group_size: int
) -> None:
    """Half-split bytes: plane by plane, the codes of two bytes at a time."""
    unit = min(group_size, HALF)
    weights = flat.view(-1, 2, HALF // unit, unit)
    unit_scales = _unit_scales(scales, group_size, unit, weights.shape[0])
    words = packed.view(torch.uint16).view(-1, HALF // 2)
    tables = [_pair_table(levels, packed.device, 4 * plane) for plane in range(2)]
    for start in range(0, weights.shape[0], CHUNK // RUN):
        chunk = slice(start, start + CHUNK // RUN)
        pair = _scratch_like(words[chunk], "pair", torch.int32).copy_(words[chunk]).view(-1)
        index = _scratch_like(pair, "index", torch.int32)
        pairs = _scratch_like(pair, "products", torch.int64)
        products = pairs.view(torch.float32).view(-1, HALF // unit, unit)
        for plane, table in enumerate(tables):
            torch.bitwise_and(pair, PAIR_MASK << 4 * plane, out=index)
            torch.index_select(table, 0, index, out=pairs)
            weights[chunk, plane] = products.mul_(unit_scales[chunk, plane])


def _unit_scales(scales: Tensor, group_size: int, unit: int, num_runs: int) -> Tensor:
    """Scales, float32 [runs, 2, 64 / unit, 1], one for each `unit` weights of a plane."""
    if group_size > unit:
        scales = scales.repeat_interleave(group_size // unit)
    num_units = num_runs * RUN // unit
    if scales.numel() < num_units:
        scales = pad(scales, (0, num_units - scales.numel()))
    return scales[:num_units].view(num_runs, 2, HALF // unit, 1)


@cache
def _pair_table(levels: tuple[float, ...], device: torch.device, shift: int) -> Tensor:
    """The float32 levels of the nibbles at `shift` and `shift` + 8 of an index, two in an int64.

    Two weights cost one look-up. Of the entries only the 256 that a mask leaves are ever met, so
    they are soon back in the first-level cache after a matrix product has filled it.
    """
    with torch.inference_mode(False):
        level = torch.tensor(levels, dtype=torch.float32, device=device)
        index = torch.arange((PAIR_MASK << shift) + 1, device=device)
        pairs = torch.stack([level[index >> shift & 15], level[index >> shift + 8]], 1)
        return pairs.view(torch.int64).view(-1)


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
    products = _scratch_like(codes, "products", torch.float32)
    weights.copy_(products.copy_(codes).sub_(128).mul_(steps))


def _scratch_like(shape_of: Tensor, role: str, dtype: torch.dtype) -> Tensor:
    """An uninitialized buffer in the shape of a tensor; on the CPU the next call reuses it."""
    if shape_of.device.type != "cpu":
        return torch.empty_like(shape_of, dtype=dtype)
    return scratch(role, shape_of.numel(), dtype).view(shape_of.shape)
