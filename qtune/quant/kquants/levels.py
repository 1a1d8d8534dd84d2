"""The numbers that a code can stand for: which is nearest, and on which scales to try them.

Levels are float32 tensors, since sums over them are what the fit is made of.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# parts of one that are told apart between the values of a table
DENSITY = 8


@dataclass(frozen=True)
class Integers:
    """The whole numbers from `low` to `high`."""

    low: int
    high: int

    def ends(self) -> list[float]:
        """Where the largest weight may be put: at the last level or a little to either side."""
        last = self.low if self.low < 0 else self.high
        # thirds meet whole numbers too; of few levels the next but one is too far away
        step = min(1 / 3, (self.high - self.low + 1) / 28)
        return [last + step * place for place in range(-7, 8)]

    def nearest_(self, ratios: Tensor) -> Tensor:
        """Levels, float32 [...], nearest to ratios [...], which they replace."""
        return ratios.round_().clamp_(self.low, self.high)

    def codes(self, levels: Tensor) -> Tensor:
        """Codes, uint8 [...], of levels: counted from `low`."""
        return (levels - self.low).to(torch.uint8)


@dataclass(frozen=True)
class Table:
    """Whole numbers at uneven distances, in ascending order."""

    values: tuple[int, ...]

    def ends(self) -> list[float]:
        """Where the largest weight may be put: around the last level of either side."""
        shares = (0.8, 0.9, 1.0, 1.1, 1.2)
        return [end * share for end in (self.values[0], self.values[-1]) for share in shares]

    def nearest_(self, ratios: Tensor) -> Tensor:
        """Levels, float32 [...], nearest to ratios [...], which they replace."""
        first, last = self.values[0], self.values[-1]
        places = ratios.clamp_(first, last).sub_(first).mul_(DENSITY).round_()
        nearest = _nearest(self.values, ratios.device).index_select(0, places.int().view(-1))
        return ratios.copy_(nearest.view(ratios.shape))

    def codes(self, levels: Tensor) -> Tensor:
        """Codes, uint8 [...], of levels: their places in the table."""
        values = torch.tensor(self.values, dtype=torch.float32, device=levels.device)
        return torch.bucketize(levels, values).to(torch.uint8)


Levels = Integers | Table


@cache
def _nearest(values: tuple[int, ...], device: torch.device) -> Tensor:
    """What is nearest, float32 [N], to the numbers from the first value on, DENSITY in one."""
    with torch.inference_mode(False):
        levels = torch.tensor(values, dtype=torch.float32, device=device)
        ratios = torch.arange((values[-1] - values[0]) * DENSITY + 1, device=device) / DENSITY
        return levels[torch.bucketize(ratios + values[0], (levels[1:] + levels[:-1]) / 2)]
