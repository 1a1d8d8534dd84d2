"""The search over ranges against trying them all in float64."""

import pytest
import torch
from torch import Tensor

from qtune.quant import clip
from qtune.quant.clip import KEEPS, best, fitted
from qtune.quant.format import Format, Params, load_format

SEARCHED = ["int4", "int3", "int2", "int4_sym", "int3_sym", "int2_sym", "lm3", "lm2"]


def random_groups(num: int = 50, size: int = 64) -> Tensor:
    return torch.randn(num, size, generator=torch.Generator().manual_seed(3))


def error(fmt: Format, groups: Tensor, params: Params, importance: Tensor) -> Tensor:
    back = fmt.decode(fmt.encode(groups, params), params)
    return ((back.double() - groups.double()).square() * importance.double()).sum(-1)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_share_of_the_range_is_better(name: str, weighted: bool) -> None:
    fmt, groups = load_format(name), random_groups()
    importance = torch.rand(50, 64).square() if weighted else None
    weights = torch.ones_like(groups) if importance is None else importance
    found = error(fmt, groups, best(fmt, groups, importance), weights)
    every = [error(fmt, groups, fmt.fit(groups, keep), weights) for keep in KEEPS]
    assert torch.allclose(found, torch.stack(every).amin(0), rtol=1e-5)


@pytest.mark.parametrize("name", ["int2", "lm2", "int2_sym"])
def test_two_bits_gain_much(name: str) -> None:
    fmt, groups = load_format(name), random_groups(400)
    ones = torch.ones_like(groups)
    plain = error(fmt, groups, fmt.fit(groups), ones).sum()
    searched = error(fmt, groups, best(fmt, groups), ones).sum()
    assert searched < (0.98 if name == "lm2" else 0.7) * plain


def test_slices_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, groups = load_format("int3"), random_groups()
    importance = torch.rand(50, 64)
    whole = best(fmt, groups, importance)
    monkeypatch.setattr(clip, "SLICE", 64 * 7)
    parts = best(fmt, groups, importance)
    assert torch.equal(whole.scales, parts.scales)
    assert whole.zeros is not None and parts.zeros is not None
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (50, 1), (50, 64)], ids=str)
def test_importance_broadcasts(shape: tuple[int, ...]) -> None:
    fmt, groups, importance = load_format("int2"), random_groups(), torch.rand(shape) + 0.1
    full = importance.expand(50, 64).contiguous()
    assert torch.equal(best(fmt, groups, importance).scales, best(fmt, groups, full).scales)


def test_weights_that_count_for_nothing_are_given_up() -> None:
    groups = 0.2 * random_groups(1)
    groups[0, 0] = 1.0
    importance = torch.ones(64)
    fmt = load_format("int2_sym")
    importance[0] = 1000
    assert torch.equal(best(fmt, groups, importance).scales, fmt.fit(groups, KEEPS[0]).scales)
    importance[0] = 0
    assert torch.equal(best(fmt, groups, importance).scales, fmt.fit(groups, KEEPS[-1]).scales)


def test_only_formats_that_search_are_searched() -> None:
    groups = random_groups()
    for name in ("nf4", "int8", "ternary"):
        fmt = load_format(name)
        assert torch.equal(fitted(fmt, groups).scales, fmt.fit(groups).scales)
    fmt = load_format("int2")
    assert torch.equal(fitted(fmt, groups).scales, best(fmt, groups).scales)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    groups = random_groups()
    groups[7, 3] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        best(load_format("lm2"), groups)


def test_on_meta() -> None:
    found = best(load_format("int3"), torch.empty(5, 64, device="meta"))
    assert found.zeros is not None
    assert found.scales.shape == found.zeros.shape == (5,) and found.scales.is_meta
