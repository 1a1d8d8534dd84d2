"""Which format each layer gets, so that all of them lose least within a number of bytes.

A multiple-choice knapsack: of every layer's options (bytes, loss) exactly one is taken. What layers
lose is taken to add up. The relaxation that may mix two options of a layer is solved by going up
the convex hulls of all layers in the order of loss saved per byte, so that greedy choice is at most
one step from its optimum, and that optimum is a bound for every choice there is.

Matrices of a model have few different sizes, so few different sums of bytes occur. As long as that
holds, keeping the best choice for each sum gives the exact optimum; otherwise the greedy one is
taken, and `Allocation.bound` says how much better any other could be.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

from qtune.errors import UserError
from qtune.recipe_quant import FormatName

# sums of bytes that the exact way keeps at most: some seconds for hundreds of layers
MOST_SUMS = 4000


@dataclass(frozen=True)
class Option:
    """A format that a layer may have: what the layer takes then, and what the model loses."""

    format: FormatName
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """A format for every layer, with the bytes and the loss of all of them."""

    formats: dict[str, FormatName]
    size_bytes: int
    loss: float
    bound: float
    """No choice within the budget loses less than this."""


@dataclass(frozen=True)
class _Step:
    """From one option of a layer to the next one up its hull."""

    layer: str
    option: Option
    size_bytes: int
    gain: float


def allocate(options: Mapping[str, Sequence[Option]], budget_bytes: int) -> Allocation:
    """The option of each layer with which all together take at most `budget_bytes` and lose least.

    Raises UserError with the least number of bytes where that is more than the budget.
    """
    hulls = {layer: _hull(choices) for layer, choices in options.items()}
    least = sum(hull[0].size_bytes for hull in hulls.values())
    if least > budget_bytes:
        raise UserError(
            f"the quantized layers take at least {least} bytes in the formats given, and the "
            f"budget is {budget_bytes}; raise it, or add a format with fewer bits"
        )
    greedy, bound = _greedy(hulls, budget_bytes)
    chosen = _exact(options, budget_bytes) or greedy
    return Allocation(
        formats={layer: option.format for layer, option in chosen.items()},
        size_bytes=sum(option.size_bytes for option in chosen.values()),
        loss=sum(option.loss for option in chosen.values()),
        bound=bound,
    )


def _hull(choices: Sequence[Option]) -> list[Option]:
    """The lower convex hull of a layer's options, from the smallest to the best."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda it: (it.size_bytes, it.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(smaller: Option, larger: Option) -> float:
    """Loss saved per byte."""
    return (smaller.loss - larger.loss) / (larger.size_bytes - smaller.size_bytes)


def _greedy(hulls: Mapping[str, list[Option]], budget: int) -> tuple[dict[str, Option], float]:
    """The choice by loss saved per byte, and the loss of the relaxed optimum.

    Behind the first step that does not fit, smaller ones are taken; a layer whose step did not fit
    goes no further.
    """
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    free = budget - sum(option.size_bytes for option in chosen.values())
    bound, relaxed = sum(option.loss for option in chosen.values()), True
    stopped: set[str] = set()
    for step in _steps(hulls):
        if relaxed:
            bound -= step.gain * min(1.0, free / step.size_bytes)
            relaxed = step.size_bytes <= free
        if step.size_bytes > free or step.layer in stopped:
            stopped.add(step.layer)
            continue
        chosen[step.layer] = step.option
        free -= step.size_bytes
    return chosen, bound


def _steps(hulls: Mapping[str, list[Option]]) -> list[_Step]:
    """All steps up the hulls, the best first; those of a layer are in order, hulls being convex."""
    steps = [
        _Step(layer, larger, larger.size_bytes - smaller.size_bytes, smaller.loss - larger.loss)
        for layer, hull in hulls.items()
        for smaller, larger in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.gain / step.size_bytes)


@dataclass(frozen=True)
class _Sum:
    """The best choice for the layers so far that takes so many bytes."""

    size_bytes: int
    loss: float
    option: Option | None = None
    before: "_Sum | None" = None

    def with_option(self, option: Option) -> "_Sum":
        return _Sum(self.size_bytes + option.size_bytes, self.loss + option.loss, option, self)


def _exact(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option] | None:
    """The optimum; None where there are more sums of bytes than are worth the time."""
    least = [min(option.size_bytes for option in choices) for choices in options.values()]
    left = sum(least)
    sums = [_Sum(0, 0.0)]
    for choices, smallest in zip(options.values(), least, strict=True):
        left -= smallest
        sums = _undominated([at.with_option(o) for at in sums for o in choices], budget - left)
        if len(sums) > MOST_SUMS:
            return None
    return dict(zip(options, _options_of(sums[-1]), strict=True))


def _undominated(sums: list[_Sum], most: int) -> list[_Sum]:
    """Those of at most so many bytes that lose less than every smaller one, smallest first."""
    sums.sort(key=lambda it: (it.size_bytes, it.loss))
    fitting = sums[: bisect_right(sums, most, key=lambda it: it.size_bytes)]

    def add(kept: list[_Sum], found: _Sum) -> list[_Sum]:
        if not kept or found.loss < kept[-1].loss:
            kept.append(found)
        return kept

    start: list[_Sum] = []
    return reduce(add, fitting, start)


def _options_of(last: _Sum) -> list[Option]:
    """The options that lead to a sum, those of the first layer first."""
    found: list[Option] = []
    at: _Sum | None = last
    while at is not None and at.option is not None:
        found.append(at.option)
        at = at.before
    return found[::-1]
