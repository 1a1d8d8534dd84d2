"""Dithered codes: none moves by itself, and changes move their share, to the nearest level."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtune.quant import dither
from qtune.quant.dither import cells_of, dithered, original_places, shifted_codes
from qtune.quant.format import format_names, load_format
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune_kernels.packing import unpack
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# whose codes are of eight weights together
FORMATS = sorted({*format_names()} - {"e8p"})
# in, out features, storage
VARIANTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (128, 24, {}),
    "odd": (100, 13, {}),
    "rotated": (192, 16, {"rotated": True}),
    "channels": (64, 10, {"channels": True}),
    "rows": (144, 6, {"group_size": "row"}),
    "whole": (64, 6, {"group_size": "tensor"}),
}


def dense(variant: str = "plain") -> nn.Linear:
    torch.manual_seed(0)
    columns, rows, _ = VARIANTS[variant]
    return nn.Linear(columns, rows, bias=False)


def make(name: str, variant: str = "plain") -> QuantLinear:
    return QuantLinear.from_linear(dense(variant), Storage(format=name, **VARIANTS[variant][2]))


def places_of(layer: QuantLinear, variant: str, original: bool) -> Tensor | None:
    return original_places(layer, dense(variant).weight.detach()) if original else None


def update(layer: QuantLinear, size: float = 0.02) -> tuple[Tensor, Tensor]:
    """A [2, I] for inner inputs, and B [O, 2]."""
    return torch.randn(2, layer.in_features), size * torch.randn(layer.out_features, 2)


def codes_of(layer: QuantLinear, packed: Tensor) -> Tensor:
    count = layer.in_features * layer.out_features
    return unpack(packed, layer.format.bits, count).long()


def ratios(layer: QuantLinear, weight: Tensor) -> Tensor:
    """Inner weights over scales, plus zero points, in float64."""
    scales = layer.quant_weight.scales
    steps = dequantize_scales(scales)
    found = weight.double().view(-1) / spread(layer, steps)
    if scales.zeros is None:
        return found
    zeros = unpack_zeros(scales.zeros, layer.format.bits, steps.numel())
    return found + spread(layer, zeros)


def spread(layer: QuantLinear, of_groups: Tensor) -> Tensor:
    count = layer.in_features * layer.out_features
    return of_groups.double().repeat_interleave(layer.group_size)[:count]


@pytest.mark.parametrize("original", [False, True], ids=["random", "original"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_update_the_codes_are_those_of_the_base(
    variant: str, name: str, original: bool
) -> None:
    layer = make(name, variant)
    places = places_of(layer, variant, original)
    assert torch.equal(shifted_codes(layer, *update(layer, 0.0), 2.0, places), layer.weight)


@pytest.mark.parametrize("original", [False, True], ids=["random", "original"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_are_the_nearest_to_the_sum_in_float64(
    variant: str, name: str, original: bool
) -> None:
    layer = make(name, variant)
    places = places_of(layer, variant, original)
    a, b = update(layer)
    target = ratios(layer, dithered(layer, places).double() + 2.0 * b.double() @ a.double())
    # the lowest code of 8 bits is never used
    values = torch.tensor(layer.format.levels or [code - 128.0 for code in range(256)]).double()
    usable = values if layer.format.levels else values[1:]
    nearest = (target.unsqueeze(1) - usable).abs().amin(1)
    packed = shifted_codes(layer, a, b, 2.0, places)
    # two levels may be as near as float32 can tell
    assert ((target - values[codes_of(layer, packed)]).abs() <= nearest + 1e-4).all()
    assert (packed != layer.weight).any()


@pytest.mark.parametrize("name", FORMATS)
def test_original_weights_are_known_to_a_256th_of_a_cell(name: str) -> None:
    layer, weight = make(name), dense().weight.detach()
    error = ratios(layer, dithered(layer, original_places(layer, weight))) - ratios(layer, weight)
    codes = codes_of(layer, layer.weight)
    middles, widths = (torch.tensor(p).double()[codes] for p in cells_of(layer.format.levels))
    inside = ((ratios(layer, weight) - middles) / widths).abs() < 0.5
    assert inside.double().mean() > 0.6
    assert (error.abs()[inside] <= widths[inside] / 512 + 1e-4).all()


def test_a_weight_that_a_method_moved_is_at_the_edge_of_its_cell() -> None:
    layer, weight = make("int4"), dense().weight.detach()
    codes = codes_of(layer, layer.weight)
    settled = layer.settle(load_format("int4").fit(weight.view(-1, layer.group_size)))
    layer.load(layer.store((codes + 1).clamp(max=15).to(torch.uint8), settled))
    places = original_places(layer, weight)
    assert (places[codes < 15] == 0).all()
    assert torch.equal(shifted_codes(layer, *update(layer, 0.0), 1.0, places), layer.weight)


@pytest.mark.parametrize("name", FORMATS)
def test_places_are_spread_evenly_over_the_cells(name: str) -> None:
    layer = make(name)
    codes = codes_of(layer, layer.weight)
    middles, widths = (torch.tensor(p).double()[codes] for p in cells_of(layer.format.levels))
    places = (ratios(layer, dithered(layer)) - middles) / widths
    assert places.abs().max() < 0.5
    assert abs(places.mean()) < 0.02
    assert abs(places.square().mean() - 1 / 12) < 0.005


@pytest.mark.parametrize("name", ["int4", "int2_sym", "nf4"])
def test_the_mean_of_decoded_codes_moves_by_the_change(name: str) -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(512, 512, bias=False), Storage(format=name))
    weight = layer.dequantize(torch.float32)
    # a hundredth of the weights' size everywhere, far less than half a step
    change = float(weight.abs().mean()) / 100
    a, b = torch.full((1, 512), change), torch.ones(512, 1)
    tuned = QuantLinear(512, 512, storage=layer.storage)
    stored = {key: getattr(layer, key) for key in layer.tensor_names}
    tuned.load(stored | {"weight": shifted_codes(layer, a, b, 1.0)})
    moved = tuned.dequantize(torch.float32) - weight
    # those of the highest level cannot go on
    levels = layer.format.levels
    free = (codes_of(layer, layer.weight) != levels.index(max(levels))).double().mean()
    assert 0.9 * free * change < moved.mean() < 1.1 * free * change
    assert (moved != 0).double().mean() < 0.1


def test_slices_and_calls_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variant in (("nf4", "odd"), ("int3", "rows"), ("int8", "plain")):
        layer = make(name, variant)
        places, (a, b) = places_of(layer, variant, original=True), update(layer)
        whole = [shifted_codes(layer, a, b, 1.0, given) for given in (None, places)]
        with monkeypatch.context() as patch:
            patch.setattr(dither, "SLICE", 64)
            again = [shifted_codes(layer, a, b, 1.0, given) for given in (None, places)]
            assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
            assert torch.equal(places_of(layer, variant, original=True), places)


def test_no_two_rows_have_the_same_places() -> None:
    layer = make("int8")
    places = dithered(layer) - layer.dequantize_inner(torch.float32)
    ranks = places.argsort(1)
    assert len(ranks.unique(dim=0)) == layer.out_features


def test_cells_meet_halfway_between_levels() -> None:
    cells = cells_of((-1.0, 0.0, 3.0, 1.0))
    assert cells.middles == (-1.0, 0.0, 3.0, 1.25)
    assert cells.widths == (1.0, 1.0, 2.0, 1.5)
    assert not cells.are_even and cells_of((0.0, 1.0, 2.0, 3.0)).are_even
