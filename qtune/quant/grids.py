"""The kinds of grids that formats are made of: a table of levels, and integers with or without
zero points.

A format's file says which numbers its codes stand for; how groups are fitted to them, and which of
them is nearest, is the same for all and stands here. Of two levels as near, codes are of the lower
one, as the kernels choose them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qtune.quant.format import Params, ScaleKind, ZeroKind
from qtune_kernels.nearest import SMALLEST_SCALE, cells_of
from qtune_kernels.quantize import absmax

# groups [..., G] -> scales [...]
ScaleOf = Callable[[Tensor], Tensor]


def largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, float32 [...], of groups [..., G]."""
    found: Tensor = absmax(groups, groups.shape[-1])
    return found.view(groups.shape[:-1])


def mean_magnitude(groups: Tensor) -> Tensor:
    """The mean magnitude of each group, float32 [...], of groups [..., G]."""
    return groups.abs().mean(-1)


@dataclass(frozen=True)
class Table:
    """A format of `levels`, one for each code, times a scale: where level 1 comes to lie."""

    levels: tuple[float, ...]
    scale_kind: ScaleKind = "linear"
    encodes_stored_scales: bool = True
    searches: bool = True
    scale: ScaleOf = largest
    zero_kind: ZeroKind | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return len(self.levels).bit_length() - 1

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """Scales, float32 [...]: the share `keep` of what `scale` finds."""
        return Params(self.scale(groups) * keep)

    def encode(self, groups: Tensor, params: Params) -> Tensor:
        """Codes of the nearest levels, uint8 [..., G]."""
        ratios = _ratios(groups, params).clamp_(min(self.levels), max(self.levels)).view(-1)
        cells = cells_of(self.levels, groups.device)
        cell = cells.places(ratios, torch.empty_like(ratios)).int()
        above = ratios > cells.bounds.index_select(0, cell)
        return cells.codes.index_select(0, cell * 2 + above).view(groups.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights, float32 [..., G]."""
        table = _tensor(self.levels, codes.device)
        levels = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return _weights(levels, params)


@dataclass(frozen=True)
class _Steps:
    """Levels one apart, from `first` on."""

    bits: int
    scale_kind: ScaleKind = "linear"
    encodes_stored_scales: bool = True
    searches: bool = True

    @property
    def first(self) -> float:
        """The lowest level."""
        raise NotImplementedError

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        """What codes stand for."""
        return tuple(self.first + code for code in range(self.most + 1))

    def encode(self, groups: Tensor, params: Params) -> Tensor:
        """Codes of the nearest levels, uint8 [..., G]."""
        codes = _ratios(groups, params).sub_(self.first + 0.5).ceil_()
        return codes.clamp_(0, self.most).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights, float32 [..., G]."""
        return _weights(codes.float().add_(self.first), params)


@dataclass(frozen=True)
class Affine(_Steps):
    """Integers from 0 on, less a whole zero point, times a scale: covers a group's own range."""

    zero_kind: ZeroKind | None = "codes"

    @property
    def first(self) -> float:
        """The lowest level."""
        return 0.0

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """Scales and whole zero points [...] for `keep` of the range, widened to include 0."""
        least, greatest = groups.amin(-1).clamp(max=0) * keep, groups.amax(-1).clamp(min=0) * keep
        scales = (greatest - least) / self.most
        zeros = (-least / scales.where(scales > 0, 1)).round().clamp(0, self.most)
        return Params(scales, zeros)


@dataclass(frozen=True)
class Symmetric(_Steps):
    """Integers around 0 times a scale; of 2 bits halves, as a level at 0 would be one of four.

    There is one integer more below 0 than above: scales have the sign that brings the largest
    magnitude there, which takes a tenth off the squared error.
    """

    zero_kind: ZeroKind | None = None

    @property
    def first(self) -> float:
        """The lowest level."""
        return -1.5 if self.bits == 2 else -float(1 << self.bits - 1)

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """Scales, float32 [...], that bring the lowest level to `keep` of the largest magnitude."""
        if self.bits == 2:
            return Params(largest(groups) * keep / -self.first)
        least, greatest = groups.amin(-1), groups.amax(-1)
        extreme = torch.where(-least >= greatest, least, greatest)
        return Params(extreme * keep / self.first)


def _ratios(groups: Tensor, params: Params) -> Tensor:
    """Weights over scales, plus zero points: levels before rounding, a new tensor [..., G].

    Reciprocals are multiplied, as bitsandbytes rounds.
    """
    steps = params.scales.where(params.scales.abs() > SMALLEST_SCALE, SMALLEST_SCALE)
    ratios = groups * (1 / steps).unsqueeze(-1)
    return ratios if params.zeros is None else ratios.add_(params.zeros.unsqueeze(-1))


def _weights(levels: Tensor, params: Params) -> Tensor:
    """(level - zero) * scale, [..., G], in place."""
    if params.zeros is not None:
        levels.sub_(params.zeros.unsqueeze(-1))
    return levels.mul_(params.scales.unsqueeze(-1))


@cache
def _tensor(levels: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(levels, dtype=torch.float32, device=device)
