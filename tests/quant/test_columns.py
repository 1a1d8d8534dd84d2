"""Rounding column by column against textbook forms in float64, and all codes of a tiny weight."""

from itertools import product

import pytest
import torch
from quant_layers import hessian_of, weight_of
from torch import Tensor

from qtune.quant.columns import BLOCK, Columns, ParamsOf, blocks
from qtune.quant.format import Format, Params, load_format
from qtune.quant.hessian import inverse_root


def columns_of(fmt: Format, weight: Tensor, hessian: Tensor) -> Columns:
    regular, root = inverse_root(hessian, 0.01, print)
    return Columns(fmt, weight.T.contiguous(), regular.float(), root.float())


def constant(fmt: Format, weight: Tensor) -> ParamsOf:
    """The parameters of each row, the same for all columns."""
    fitted = fmt.fit(weight)

    def find(block: slice, _: Tensor) -> Params:
        size = block.stop - block.start
        zeros = None if fitted.zeros is None else fitted.zeros.expand(size, -1)
        return Params(fitted.scales.expand(size, -1), zeros)

    return find


def optimal_brain(fmt: Format, weight: Tensor, hessian: Tensor) -> Tensor:
    """Codes [O, I] by arXiv 2208.11580: the inverse loses a row and column with each step."""
    params, rest = fmt.fit(weight), weight.double().clone()
    inverse = torch.linalg.inv(hessian.double())
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for j in range(weight.shape[1]):
        codes[:, j : j + 1] = fmt.encode(rest[:, j : j + 1].float(), params)
        value = fmt.decode(codes[:, j : j + 1], params).double()[:, 0]
        rest -= ((rest[:, j] - value) / inverse[j, j]).outer(inverse[j])
        inverse = inverse - inverse[:, j].outer(inverse[j]) / inverse[j, j]
    return codes


def lost(fmt: Format, weight: Tensor, codes: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T [O] in float64 for each row."""
    change = fmt.decode(codes, fmt.fit(weight)).double() - weight.double()
    return ((change @ hessian.double()) * change).sum(1)


@pytest.mark.parametrize("name", ["int2", "int4_sym", "nf4", "int8"])
@pytest.mark.parametrize("size", [7, BLOCK, 1000])
def test_rounded_is_the_optimal_brain_compressor(name: str, size: int) -> None:
    fmt, weight = load_format(name), weight_of(16, 150)
    columns = columns_of(fmt, weight, hessian_of(150))
    found = columns.rounded(constant(fmt, weight), size).T
    expected = optimal_brain(fmt, weight, columns.hessian)
    # where float32 is not sure of a tie, everything behind it in the row may differ
    assert (found == expected).all(1).float().mean() > 0.7
    ratio = lost(fmt, weight, found, columns.hessian) / lost(fmt, weight, expected, columns.hessian)
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_parameters_are_asked_for_the_weights_as_errors_have_changed_them() -> None:
    fmt, weight = load_format("int2"), weight_of(8, 96)
    columns = columns_of(fmt, weight, hessian_of(96))
    usual, seen = constant(fmt, weight), {}

    def note(block: slice, weights: Tensor) -> Params:
        seen[block.start] = weights.clone()
        return usual(block, weights)

    columns.rounded(note, 32)
    assert list(seen) == [0, 32, 64]
    assert torch.equal(seen[0], columns.weights[:32])
    assert not torch.allclose(seen[32], columns.weights[32:64], atol=1e-3)


def test_rounding_anew_ends_where_no_single_change_helps() -> None:
    fmt, weight = load_format("int2"), weight_of(3, 5)
    columns = columns_of(fmt, weight, hessian_of(5))
    params_of = constant(fmt, weight)
    codes = columns.rounded(params_of)
    for _ in range(10):
        columns.round_anew(codes, params_of)
    best = lost(fmt, weight, codes.T, columns.hessian)
    for column, code in product(range(5), range(4)):
        other = codes.T.clone()
        other[:, column] = code
        assert (lost(fmt, weight, other, columns.hessian) >= best - 1e-6).all()


def test_close_to_the_best_of_all_codes() -> None:
    fmt, weight = load_format("int2"), weight_of(12, 6)
    columns = columns_of(fmt, weight, hessian_of(6))
    params_of = constant(fmt, weight)
    codes = columns.rounded(params_of)
    columns.round_anew(codes, params_of)
    found = lost(fmt, weight, codes.T, columns.hessian)
    every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
    best = torch.stack(
        [lost(fmt, weight, row.expand(12, -1), columns.hessian) for row in every]
    ).amin(0)
    nearest = lost(fmt, weight, fmt.encode(weight, fmt.fit(weight)), columns.hessian)
    assert (found >= best - 1e-6).all()
    # of what nearest codes lose too much, most is gained
    assert (found - best).sum() < 0.25 * (nearest - best).sum()


@pytest.mark.parametrize("name", ["int2", "int3_sym", "lm3", "int8"])
def test_rounding_anew_never_loses(name: str) -> None:
    fmt, weight = load_format(name), weight_of(32, 160)
    columns = columns_of(fmt, weight, hessian_of(160))
    params_of = constant(fmt, weight)
    codes = columns.rounded(params_of)
    before = lost(fmt, weight, codes.T, columns.hessian)
    columns.round_anew(codes, params_of)
    after = lost(fmt, weight, codes.T, columns.hessian)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


def test_blocks_cover() -> None:
    assert [(b.start, b.stop) for b in blocks(10, 4)] == [(0, 4), (4, 8), (8, 10)]
