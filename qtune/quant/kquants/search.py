"""The scale and the minimum of each group by itself, before those of a block share their steps.

The squared error has many local minima, as each rounding is a jump; so several grids are tried.
Each gives levels, the levels give the best scale by least squares, and how much that takes off the
error follows from sums.
"""

import torch
from torch import Tensor

from qtune.quant.kquants.levels import Integers, Levels
from qtune.quant.kquants.moments import Line, Moments, Target, line, moments, quotient


def scales(target: Target, levels: Levels) -> Tensor:
    """Scales, float32 [S, N], of the least squared error of x - scale q."""
    extreme = _extreme(target.x)
    best = gain = torch.zeros_like(extreme)
    for end in levels.ends():
        ratios = target.x * quotient(end, extreme).unsqueeze(-2)
        found = moments(target, levels.nearest_(ratios))
        scale = quotient(found.qx, found.qq)
        gained = scale * found.qx
        best = scale.where(gained > gain, best)
        gain = gain.maximum(gained)
    return best


def scales_and_minima(
    target: Target, levels: Integers, negative: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and minima, float32 [S, N], of the least squared error of x - (scale q - minimum).

    Minima are at least 0 unless they may be `negative`.
    """
    least = target.x.amin(-2)
    least = least if negative else least.clamp(max=0)
    span = target.x.amax(-2) - least
    above = target.x - least.unsqueeze(-2)
    one, x = target.worth.sum(-2), target.worth_x.sum(-2)
    scale, minimum, gain = span / levels.high, -least, torch.full_like(span, -torch.inf)
    for end in levels.ends():
        ratios = above * quotient(end, span).unsqueeze(-2)
        found = moments(target, levels.nearest_(ratios))
        tried = line(found, one, x) if negative else _positive(found, one, x)
        gained = tried.scale * found.qx - tried.minimum * x
        better = (gained > gain) & tried.unique
        scale, minimum = tried.scale.where(better, scale), tried.minimum.where(better, minimum)
        gain = gained.where(better, gain)
    return scale, minimum


def _extreme(x: Tensor) -> Tensor:
    """The weight of the largest magnitude, [S, N], of groups [S, G, N].

    With its sign: levels reach one further below 0, and a negative scale takes any weight there.
    """
    least, greatest = x.amin(-2), x.amax(-2)
    return least.where(-least >= greatest, greatest)


def _positive(found: Moments, one: Tensor, x: Tensor) -> Line:
    """The line of least squares among those with minima of at least 0."""
    free = line(found, one, x)
    through_zero = quotient(found.qx, found.qq)
    return Line(
        free.scale.where(free.minimum > 0, through_zero), free.minimum.clamp(min=0), free.unique
    )
