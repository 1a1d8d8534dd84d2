"""The numbers of a block: levels, whole numbers for scales and minima, and the steps they count.

Starting from each group's own best, scales and minima are rounded to whole numbers of one step for
the block. Then everything is chosen again in turn, with the rest kept: each choice is the exact
one of least squares, so the error only falls. Steps are rounded to 16 bits before the last turn,
which makes up for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qtune.quant.kquants import search
from qtune.quant.kquants.kinds import Kind
from qtune.quant.kquants.levels import Integers
from qtune.quant.kquants.moments import Moments, Target, line, moments, quotient

TURNS = 3
# the least that a 16-bit float can be
SMALLEST = 2.0**-24


class Part(NamedTuple):
    """Scales or minima of N blocks: whole numbers [S, N] of a step [N], all float32."""

    counts: Tensor
    step: Tensor

    @property
    def values(self) -> Tensor:
        """The scales or minima themselves, float32 [S, N]."""
        return self.step * self.counts


class Block(NamedTuple):
    """What the bytes of N blocks say: levels, float32 [S, G, N], scales, and minima of some."""

    levels: Tensor
    scales: Part
    minima: Part | None


def fit(target: Target, kind: Kind) -> Block:
    """The blocks of `kind` near a target, in the weighted square."""
    scales, minima = _start(target, kind)
    for _ in range(TURNS):
        found = moments(target, _levels(target, kind, scales, minima))
        scales, minima = _counts(target, kind, found, scales, minima)
        scales, minima = _steps(target, found, scales, minima)
    found = moments(target, _levels(target, kind, scales, minima))
    scales, minima = _rounded(scales), None if minima is None else _rounded(minima)
    scales, minima = _counts(target, kind, found, scales, minima)
    return Block(_levels(target, kind, scales, minima), scales, minima)


def _start(target: Target, kind: Kind) -> tuple[Part, Part | None]:
    """Each group's own best, as whole numbers of steps."""
    if kind.minima is None:
        scales = search.scales(target, kind.levels)
        return _shared(scales, target.worth_x.abs().sum(-2), kind.steps), None
    assert isinstance(kind.levels, Integers)
    # a minimum that is a float of its own may have either sign
    scales, minima = search.scales_and_minima(target, kind.levels, negative=kind.groups == 1)
    worth = target.worth.sum(-2)
    return _shared(scales, worth, kind.steps), _shared(minima, worth, kind.minima)


def _shared(values: Tensor, worth: Tensor, counts: Integers) -> Part:
    """Values [S, N] as whole numbers of one step for each block."""
    if counts.low == counts.high:
        return Part(torch.ones_like(values), values[0])
    step = search.scales(Target.of(values.unsqueeze(0), worth.unsqueeze(0)), counts)[0]
    return Part(counts.nearest_(quotient(values, step.expand_as(values))), step)


def _levels(target: Target, kind: Kind, scales: Part, minima: Part | None) -> Tensor:
    """The nearest levels [S, G, N]."""
    inverse = quotient(1.0, scales.values).unsqueeze(-2)
    if minima is None:
        return kind.levels.nearest_(target.x * inverse)
    return kind.levels.nearest_((target.x + minima.values.unsqueeze(-2)).mul_(inverse))


def _counts(
    target: Target, kind: Kind, found: Moments, scales: Part, minima: Part | None
) -> tuple[Part, Part | None]:
    """The best whole numbers for levels and steps as they are: of scales, then of minima."""
    if kind.groups == 1:
        return scales, minima
    qx = found.qx if minima is None else found.qx + minima.values * found.q
    counts = kind.steps.nearest_(quotient(qx, scales.step * found.qq))
    scales = scales._replace(counts=counts.where(found.qq > 0, scales.counts))
    if minima is None or kind.minima is None:
        return scales, minima
    above = scales.values * found.q - target.worth_x.sum(-2)
    counts = kind.minima.nearest_(quotient(above, minima.step * target.worth.sum(-2)))
    return scales, minima._replace(counts=counts)


def _steps(
    target: Target, found: Moments, scales: Part, minima: Part | None
) -> tuple[Part, Part | None]:
    """The best steps for levels and whole numbers as they are."""
    s = scales.counts
    ss, sx = (s * s * found.qq).sum(0), (s * found.qx).sum(0)
    if minima is None:
        return scales._replace(step=quotient(sx, ss)), None
    m = minima.counts
    mm, mx = (m * m * target.worth.sum(-2)).sum(0), (m * target.worth_x.sum(-2)).sum(0)
    best = line(Moments((s * m * found.q).sum(0), ss, sx), mm, mx)
    return (
        scales._replace(step=best.scale.where(best.unique, scales.step)),
        minima._replace(step=best.minimum.where(best.unique, minima.step)),
    )


def _rounded(part: Part) -> Part:
    """The same with a step that 16-bit floats have; it is 0 only where it was."""
    step = part.step.half().float()
    lost = (step == 0) & (part.step != 0)
    return part._replace(step=torch.where(lost, part.step.sign() * SMALLEST, step))
