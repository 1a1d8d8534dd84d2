"""Grids against their formulas in float64, and against the op that encodes whole matrices."""

import pytest
import torch
from torch import Tensor

from qtune.quant.format import Format, Params
from qtune.quant.grids import Affine, Symmetric, Table, largest, mean_magnitude
from qtune_kernels.packing import unpack
from qtune_kernels.quantize import encode

GRIDS: dict[str, Format] = {
    "table": Table((-1.0, -0.3, 0.2, 0.8)),
    "table with an unused code": Table((-1.0, 0.0, 1.0, 1.0)),
    "table in any order": Table((0.5, -0.25, 1.0, -1.0, 0.0, 0.75, 0.25, -0.5)),
    **{f"affine {bits}": Affine(bits) for bits in (2, 3, 4)},
    **{f"symmetric {bits}": Symmetric(bits) for bits in (2, 3, 4)},
}
EVERY = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def random_groups(num: int = 64, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, size, generator=generator) * torch.rand(num, 1, generator=generator)


def test_ranges() -> None:
    groups = torch.tensor([[[-3.0, 1.0], [0.5, 0.0]]])
    assert largest(groups).tolist() == [[3.0, 0.5]]
    assert mean_magnitude(groups).tolist() == [[2.0, 0.25]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_is_the_grid_of_gptq(bits: int) -> None:
    groups = random_groups()
    most = 2**bits - 1
    x = groups.double()
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / most
    zero = torch.round(-low / scale)
    params = Affine(bits).fit(groups)
    assert params.zeros is not None
    assert torch.allclose(params.scales.double(), scale, rtol=1e-6)
    assert torch.equal(params.zeros.double(), zero)
    exact = (x / scale[:, None] + zero[:, None]).clamp(0, most)
    codes = Affine(bits).encode(groups, params).double()
    assert (codes - exact).abs().max() <= 0.5 + 1e-5
    assert codes.amin(1).max() <= 1 and codes.amax(1).min() >= most - 1


@pytest.mark.parametrize("sign", [1, -1])
def test_affine_widens_a_range_without_zero(sign: int) -> None:
    groups = sign * (torch.rand(8, 64) + 1)
    params = Affine(4).fit(groups)
    assert params.zeros is not None and params.zeros.eq(0 if sign > 0 else 15).all()
    assert torch.allclose(params.scales, groups.abs().amax(1) / 15)


@pytest.mark.parametrize("bits", [3, 4])
def test_symmetric_brings_the_extreme_to_the_lowest_level(bits: int) -> None:
    groups = random_groups()
    params = Symmetric(bits).fit(groups)
    codes = Symmetric(bits).encode(groups, params)
    place = groups.abs().argmax(1, keepdim=True)
    assert codes.gather(1, place).eq(0).all()
    assert torch.allclose(params.scales.abs(), groups.abs().amax(1) / 2 ** (bits - 1))
    assert params.scales.lt(0).any() and params.scales.gt(0).any()


def test_keep_shrinks_the_range() -> None:
    groups = random_groups()
    for grid in GRIDS.values():
        half = grid.fit(groups, 0.5).scales
        assert torch.allclose(half, grid.fit(groups).scales / 2)


@EVERY
def test_codes_are_those_of_the_op(grid: Format) -> None:
    groups = random_groups()
    params = grid.fit(groups, 0.8)
    packed = encode(groups, params.scales, params.zeros, grid.levels, 64)
    codes = unpack(packed, grid.bits, groups.numel()).view_as(groups)
    found = grid.encode(groups, params)
    # a value that is halfway but for the last bit may go either way
    apart = grid.decode(codes, params) != grid.decode(found, params)
    assert apart.sum() <= 1
    assert (
        not apart.any()
        or ((grid.decode(codes, params) + grid.decode(found, params)) / 2 - groups)[apart]
        .abs()
        .max()
        < 1e-5
    )


@EVERY
def test_a_stored_scale_may_have_the_other_sign(grid: Format) -> None:
    groups = random_groups(4)
    params = grid.fit(groups)
    zeros = None if params.zeros is None else 2**grid.bits - 1 - params.zeros
    other = Params(-params.scales, zeros)
    back = grid.decode(grid.encode(groups, other), other)
    assert (back - groups).square().sum() < 0.9 * groups.square().sum()


@EVERY
def test_halfway_takes_the_lower_level(grid: Format) -> None:
    ascending = torch.tensor(grid.levels).unique()
    halfway = (ascending[:-1] + ascending[1:]) / 2
    zeros = None if grid.zero_kind is None else torch.zeros(1)
    params = Params(torch.ones(1), zeros)
    back = grid.decode(grid.encode(halfway.unsqueeze(0), params), params)[0]
    assert torch.equal(back, ascending[:-1])


def test_float_zero_points_move_the_levels() -> None:
    grid, groups = Table((-1.0, -0.3, 0.2, 0.8)), random_groups(3)
    params = Params(torch.full((3,), 0.5), torch.tensor([0.0, 0.125, -0.7]))
    assert params.zeros is not None
    levels = (torch.tensor(grid.levels).double() - params.zeros.double()[:, None]) * 0.5
    nearest = (levels.unsqueeze(1) - groups.double().unsqueeze(2)).abs().amin(2)
    back = grid.decode(grid.encode(groups, params), params).double()
    assert ((back - groups).abs() <= nearest + 1e-6).all()
