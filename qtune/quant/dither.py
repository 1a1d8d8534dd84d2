"""Codes of weights that have changed by little, so that the right share of them moves.

The weights that take one code are a cell of the number line, between the boundaries halfway to the
neighbouring levels. Dequantized weights all lie on a level, and a change of less than half a cell
moves none of them. So each gets a place of its own in its cell, at random and once for all: then a
change by a share of the cell moves that share of all codes, and their mean moves by the change.
This is stochastic rounding (arXiv 1502.02551) with a die that is cast once: without a change there
is none in the codes, and the same change always gives the same codes.

Where the original weight lay is a better place, if its code is the nearest: then what moves on are
weights that were nearly there, and no error grows. That takes a byte a weight. Of codes that a
calibrated method chose for the whole output it says little. The two outermost cells reach as far
out as they reach in; beyond them a change is clipped.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from qtune.quant.linear import QuantLinear
from qtune_kernels.dequantize import dequantize
from qtune_kernels.nearest import boundaries
from qtune_kernels.packing import packed_bytes, run_weights
from qtune_kernels.quantize import encode
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# after so many weights places come again: a prime, so no two rows of a matrix have the same ones
PERIOD = 131071
# not one that a model's weights may have been drawn with
SEED = 6_021_402
# parts of a cell that no place lies beyond, so that rounding puts none into the next one
REACH = 0.4995
# of a cell, in as many of which an original weight can lie
PARTS = 256
# weights whose float32 values are in memory at a time
SLICE = 1 << 20


class Cells(NamedTuple):
    """The cell of each code: its middle and its width, as numbers before zero and scale."""

    middles: tuple[float, ...]
    widths: tuple[float, ...]

    @property
    def are_even(self) -> bool:
        """Whether all have the width 1, and levels in their middles."""
        return set(self.widths) == {1.0}


@cache
def cells_of(levels: tuple[float, ...]) -> Cells:
    """The cells of a format's levels; 8 bits, which list none, stand for integers."""
    if not levels:
        return Cells(tuple(float(code - 128) for code in range(256)), (1.0,) * 256)
    bounds, order = boundaries(levels)
    first, last = levels[order[0]], levels[order[-1]]
    edges = [2 * first - float(bounds[0]), *bounds.tolist(), 2 * last - float(bounds[-1])]
    middles, widths = [0.0] * len(levels), [0.0] * len(levels)
    for place, code in enumerate(order.tolist()):
        middles[code] = (edges[place] + edges[place + 1]) / 2
        widths[code] = edges[place + 1] - edges[place]
    return Cells(tuple(middles), tuple(widths))


@torch.no_grad()
def original_places(layer: QuantLinear, weight: Tensor) -> Tensor:
    """In which part of its code's cell each original weight [O, I] lies, uint8 [O * I].

    One in another cell is at the edge that is nearer to it.
    """
    inner, found = layer.inner_weight(weight), []
    for rows in _slices(layer):
        first = rows.start // layer.in_features
        middles, widths = _cells(rows)
        away = inner[first : first + rows.shape[0]].float() - middles
        # of a group whose scale is zero no place matters
        parts = (away / widths + 0.5).nan_to_num(0.5) * PARTS
        found.append(parts.clamp_(0, PARTS - 1).to(torch.uint8).view(-1))
    return torch.cat(found)


@torch.no_grad()
def shifted_codes(
    layer: QuantLinear, a: Tensor, b: Tensor, scaling: float, places: Tensor | None = None
) -> Tensor:
    """The codes, packed, nearest to the layer's inner weights at their places plus s B A.

    A [R, I] is that for inner inputs, B is [O, R]; sums are in float32, and scales and zero points
    those of the layer. `places` are `original_places`, or random ones.
    """
    a, b, made = a.float(), b.float() * scaling, []
    for rows in _slices(layer):
        first = rows.start // layer.in_features
        weight = _placed(rows, places)
        weight.addmm_(b[first : first + len(weight)], a)
        shared = rows.scales, rows.zeros, rows.levels, rows.group_size
        made.append(encode(weight, *shared))
    return torch.cat(made)


@torch.no_grad()
def dithered(layer: QuantLinear, places: Tensor | None = None) -> Tensor:
    """The inner weights, each at its place in the cell of its code, float32 [O, I]."""
    return torch.cat([_placed(rows, places) for rows in _slices(layer)])


class _Rows(NamedTuple):
    """Some rows [N, I] of a layer, the first of them at flat weight `start`."""

    start: int
    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    levels: tuple[float, ...]
    group_size: int

    @property
    def number(self) -> int:
        """Of weights."""
        return self.shape[0] * self.shape[1]

    def decoded(self, levels: Sequence[float], zeros: Tensor | None = None) -> Tensor:
        """What codes stand for where these are the levels, float32 [N, I]."""
        none = self.scales.new_empty(0)
        shared = self.scales, none, none, zeros, levels, self.group_size
        weights: Tensor = dequantize(self.packed, *shared, *self.shape, torch.float32)
        return weights

    def steps(self) -> Tensor:
        """The scale of each weight, float32 [N, I]."""
        spread = self.scales.repeat_interleave(self.group_size)
        return spread[: self.number].view(self.shape)


def _slices(layer: QuantLinear) -> Iterator[_Rows]:
    """The layer in slices of whole rows, whole groups and whole bytes."""
    packed, scales = layer.quant_weight
    bits, group_size, width = layer.format.bits, layer.group_size, layer.in_features
    decoded, total = dequantize_scales(scales), layer.out_features * width
    zeros = None if scales.zeros is None else unpack_zeros(scales.zeros, bits, decoded.numel())
    unit = lcm(width, group_size, run_weights(bits))
    step = max(SLICE // unit, 1) * unit
    for start in range(0, total, step):
        number = min(step, total - start)
        groups = slice(start // group_size, -(-(start + number) // group_size))
        first = packed_bytes(start, bits)
        yield _Rows(
            start,
            (number // width, width),
            packed[first : first + packed_bytes(number, bits)],
            decoded[groups],
            None if zeros is None else zeros[groups],
            tuple(layer.format.levels),
            group_size,
        )


def _placed(rows: _Rows, places: Tensor | None) -> Tensor:
    middles, widths = _cells(rows)
    if places is None:
        first = rows.start % PERIOD
        periods = -(-(rows.number + PERIOD) // PERIOD)
        shares = _random_places(periods, middles.device)[first : first + rows.number]
    else:
        shares = places[rows.start : rows.start + rows.number].float()
        shares.add_(0.5).div_(PARTS).sub_(0.5)
    return middles.addcmul_(widths, shares.view(rows.shape))


def _cells(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Middle and width of the cell of each weight's code, float32 [N, I]."""
    cells = cells_of(rows.levels)
    if cells.are_even:
        return rows.decoded(rows.levels, rows.zeros), rows.steps()
    return rows.decoded(cells.middles, rows.zeros), rows.decoded(cells.widths)


@cache
def _random_places(periods: int, device: torch.device) -> Tensor:
    """Places in cells, in widths from the middle, float32 [periods * PERIOD]; same everywhere."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(SEED)
        once = torch.rand(PERIOD, generator=generator, device="cpu") * (2 * REACH) - REACH
        return once.repeat(periods).to(device)
