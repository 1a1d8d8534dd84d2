"""Boundaries and cells against a search among all levels."""

import pytest
import torch
from samples import TABLES

from qtune_kernels.nearest import boundaries, cells_of

CPU = torch.device("cpu")
# two zeros, and levels close to each other
FP4 = (0.0, 0.0052083, 0.6666667, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
LEVELS = {name: levels for name, levels in TABLES.items() if levels}
LEVELS |= {
    "fp4": FP4 + tuple(-level for level in FP4),
    "wide": (-300.0, 2.0, 2.001, 1000.0),
    "one side": (0.1, 0.2, 0.4, 0.8),
}
EVERY = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())


def chosen(levels: tuple[float, ...], ratios: torch.Tensor) -> torch.Tensor:
    cells = cells_of(levels, CPU)
    cell = cells.places(ratios, torch.empty_like(ratios)).int()
    return cells.codes[2 * cell + (ratios > cells.bounds[cell])]


@EVERY
def test_cells_agree_with_a_search_among_the_boundaries(levels) -> None:
    bounds, codes = boundaries(levels)
    ratios = torch.rand(20000) * (max(levels) - min(levels)) + min(levels)
    # where rounding could matter: at the boundaries, just beside them, and at both ends
    beside = [torch.nextafter(bounds, bounds + sign) for sign in (-1, 1)]
    ends = torch.tensor([min(levels), max(levels)])
    ratios = torch.cat([ratios, bounds, *beside, ends]).clamp(min(levels), max(levels))
    assert torch.equal(
        chosen(levels, ratios), codes[torch.bucketize(ratios, bounds)].to(torch.uint8)
    )


@EVERY
def test_a_level_is_nearest_to_itself(levels) -> None:
    values = torch.tensor(levels)
    assert torch.equal(values[chosen(levels, values).long()], values)


def test_three_equal_levels_are_an_error() -> None:
    with pytest.raises(ValueError, match="no more than two"):
        cells_of((0.0, 0.0, 0.0, 1.0), CPU)


def test_cells_are_made_once() -> None:
    assert cells_of(LEVELS["nf4"], CPU) is cells_of(LEVELS["nf4"], CPU)
