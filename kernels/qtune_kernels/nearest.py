"""Which level is nearest to a ratio: by the boundaries halfway between neighbouring levels.

A search by comparisons takes branches that no processor can foresee. So the range of the levels is
cut into cells of equal width, so narrow that each has one boundary at most: the cell of a ratio,
which is a product, and one comparison tell the level. Rounding does no harm, because the number of
a cell ascends with the ratio and boundaries are put into cells by the same computation.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# of a smaller scale the reciprocal would overflow; bitsandbytes has the same bound
SMALLEST_SCALE = 1e-38
MAX_CELLS = 1 << 20


class Boundaries(NamedTuple):
    """Between which ratios a level is the nearest."""

    bounds: Tensor
    """Halfway between two neighbouring levels, float32 [levels - 1], ascending."""
    codes: Tensor
    """The codes in the order of their levels, int64 [levels]."""


class Cells(NamedTuple):
    """Equal parts of the range of levels, from `first` on, `density` in one; a table of each."""

    first: float
    density: float
    bounds: Tensor
    """The boundary in a cell, or infinity, float32 [cells]."""
    codes: Tensor
    """The codes up to and above the boundary of each cell, uint8 [2 * cells]."""

    def places(self, ratios: Tensor, out: Tensor) -> Tensor:
        """Ratios in cells from the first one, float32 in `out`; the whole part is the cell."""
        return torch.sub(ratios, self.first, out=out).mul_(self.density)


def boundaries(levels: Sequence[float]) -> Boundaries:
    """The boundaries between levels, on the CPU."""
    values, codes = torch.tensor(levels, dtype=torch.float32, device="cpu").sort(stable=True)
    return Boundaries((values[:-1] + values[1:]) / 2, codes)


@cache
def cells_of(levels: tuple[float, ...], device: torch.device) -> Cells:
    """The cells of these levels; raises ValueError where three are equal."""
    bounds, codes = boundaries(levels)
    num_cells = 256
    while num_cells <= MAX_CELLS:
        density = num_cells / (max(levels) - min(levels))
        # one cell for the end, which rounding may push a place further on
        table = bounds.new_full((num_cells + 2,), torch.inf)
        cells = Cells(min(levels), density, table, codes)
        own = cells.places(bounds, torch.empty_like(bounds)).long()
        if len(own.unique()) == len(own):
            return _filled(cells, own, bounds, device)
        num_cells *= 2
    raise ValueError(f"no more than two levels may be equal: {levels}")


def _filled(cells: Cells, own: Tensor, bounds: Tensor, device: torch.device) -> Cells:
    """Cells with the boundaries `bounds` in the cells `own`, on the device."""
    cells.bounds[own] = bounds
    begun = torch.zeros(len(cells.bounds), dtype=torch.int64, device="cpu")
    begun[own + 1] = 1
    rank = begun.cumsum(0)
    ranks = torch.stack([rank, (rank + 1).clamp(max=len(cells.codes) - 1)], 1)
    codes = cells.codes[ranks.view(-1)].to(device, torch.uint8)
    return cells._replace(bounds=cells.bounds.to(device), codes=codes)
