"""Weighted sums over the weights of a group: all that least squares needs to know of them.

Blocks lie along the last dimension, so that sums over a group add whole vectors: weights x are
[S, G, N], S groups of G weights in N blocks.
"""

from typing import NamedTuple

from torch import Tensor

# below this share of what it would be for q and 1 at right angles, a determinant is rounding noise
NOISE = 1e-6


class Target(NamedTuple):
    """What is to be approximated."""

    x: Tensor
    """Weights, float32 [S, G, N]."""
    worth: Tensor
    """What their errors count, float32 [S, G, N]."""
    worth_x: Tensor
    """The product of both."""

    @staticmethod
    def of(x: Tensor, worth: Tensor) -> "Target":
        """The target of weights and worths, float32 [S, G, N]."""
        return Target(x, worth, worth * x)


class Moments(NamedTuple):
    """Sums over each group of worth times q, q q and q x, float32 [S, N], for levels q."""

    q: Tensor
    qq: Tensor
    qx: Tensor


class Line(NamedTuple):
    """x = scale q - minimum, where it is `unique`."""

    scale: Tensor
    minimum: Tensor
    unique: Tensor


def moments(target: Target, levels: Tensor) -> Moments:
    """The sums of levels [S, G, N] that stand for a target."""
    worth_q = target.worth * levels
    q, qx = worth_q.sum(-2), (target.worth_x * levels).sum(-2)
    return Moments(q, worth_q.mul_(levels).sum(-2), qx)


def line(found: Moments, one: Tensor, x: Tensor) -> Line:
    """The line of least squares, from the sums of q and those of worth times 1 and x."""
    determinant = found.qq * one - found.q.square()
    scale = quotient(found.qx * one - found.q * x, determinant)
    minimum = quotient(found.qx * found.q - found.qq * x, determinant)
    return Line(scale, minimum, determinant > NOISE * found.qq * one)


def quotient(numerator: Tensor | float, divisor: Tensor) -> Tensor:
    """numerator / divisor, 0 where the divisor is 0."""
    return numerator / divisor.where(divisor != 0, float("inf"))
