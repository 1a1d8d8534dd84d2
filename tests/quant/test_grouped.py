"""Groups in flat order, for widths that are and are no multiple of their size."""

import pytest
import torch
from quant_layers import weight_of

from qtune.quant.format import Params, load_format
from qtune.quant.grouped import changed, decoded, encoded, fit_groups, groups_of, params_at

SHAPES = [(4, 64, 32), (3, 100, 32), (5, 10, 64), (2, 48, 96)]


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_groups_are_those_of_the_flat_matrix(rows: int, columns: int, size: int) -> None:
    weight = weight_of(rows, columns)
    groups = groups_of(weight, size)
    flat = weight.reshape(-1).tolist()
    for number, group in enumerate(groups.tolist()):
        expected = flat[number * size : (number + 1) * size]
        assert group == expected + [0.0] * (size - len(expected))
    assert len(groups) == -(-rows * columns // size)


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_codes_and_back(rows: int, columns: int, size: int) -> None:
    fmt, weight = load_format("int4"), weight_of(rows, columns)
    params = fit_groups(fmt, weight, size, torch.ones(columns))
    codes = encoded(fmt, weight, params, size)
    assert codes.shape == weight.shape and codes.dtype == torch.uint8
    found = decoded(fmt, codes, params, size)
    assert params.zeros is not None
    for row in range(rows):
        for column in range(columns):
            at = (row * columns + column) // size
            expected = (codes[row, column] - params.zeros[at]) * params.scales[at]
            assert found[row, column] == expected
    assert (found - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_params_at(rows: int, columns: int, size: int) -> None:
    count = -(-rows * columns // size)
    params = Params(torch.arange(count).float(), -torch.arange(count).float())
    some = torch.tensor([[columns - 1], [0]])
    found = params_at(params, torch.arange(rows), some, columns, size)
    expected = [[(r * columns + c) // size for r in range(rows)] for c in (columns - 1, 0)]
    assert found.scales.tolist() == expected
    assert found.zeros is not None and (-found.zeros).tolist() == expected


def test_weighty_inputs_lose_less() -> None:
    fmt, weight = load_format("int2"), weight_of(64, 64)
    # the others reach furthest, so that what matters is better off without them
    weight[:, 1:8] *= 3
    importance = torch.ones(64)
    importance[8:] = 100
    plain = fit_groups(fmt, weight, 64, torch.ones(64))
    weighed = fit_groups(fmt, weight, 64, importance)

    def lost(params: Params) -> float:
        change = decoded(fmt, encoded(fmt, weight, params, 64), params, 64) - weight
        return float((change**2 * importance).sum())

    assert lost(weighed) < 0.9 * lost(plain)


def test_changed_leaves_missing_zeros_out() -> None:
    assert changed(Params(torch.ones(2)), lambda part: 2 * part).zeros is None
