"""Damping and factors in float64, and what is wrong with a Hessian."""

import pytest
import torch
from quant_layers import hessian_of
from torch import Tensor

from qtune.errors import UserError
from qtune.quant.hessian import damped, inverse_root


def silent(text: str) -> None:
    raise AssertionError(f"nothing should have been noted, but: {text}")


def test_damping_is_a_part_of_the_mean_diagonal() -> None:
    hessian = hessian_of(32).double()
    regular, lower = damped(hessian, 0.01, silent)
    expected = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32).double()
    torch.testing.assert_close(regular, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(lower, lower.tril())


@pytest.mark.parametrize("tokens", [300, 5])
def test_inverse_root(tokens: int) -> None:
    hessian = hessian_of(32, tokens)
    regular, root = inverse_root(hessian, 0.01, silent)
    assert torch.equal(regular, damped(hessian, 0.01, silent)[0])
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(regular), rtol=1e-9, atol=1e-9)


def test_one_input_a_million_times_stronger() -> None:
    hessian = hessian_of(64)
    hessian[3] *= 1e6
    hessian[:, 3] *= 1e6
    regular, root = inverse_root(hessian, 0.01, silent)
    inverse = root.T @ root
    torch.testing.assert_close(inverse @ regular, torch.eye(64).double(), rtol=0, atol=1e-4)


def indefinite() -> Tensor:
    hessian = torch.eye(8)
    # eigenvalues 1.3 and -0.3 beside ones
    hessian[0, 1] = hessian[1, 0] = 1.3
    return hessian


def test_indefinite_hessian_is_damped_until_it_is_not_and_named() -> None:
    notes: list[str] = []
    regular, _ = damped(indefinite(), 0.01, notes.append)
    assert regular.diagonal().tolist() == pytest.approx([2.0] * 8)
    assert len(notes) == 2 and notes[-1].endswith("damping raised to 1")
    assert "not positive definite" in notes[0]


def test_inputs_that_are_always_zero_are_counted() -> None:
    hessian = hessian_of(16)
    hessian[[2, 5]] = 0
    hessian[:, [2, 5]] = 0
    notes: list[str] = []
    regular, _ = damped(hessian, 0.01, notes.append)
    assert notes == ["2 of 16 inputs are 0 throughout the calibration text"]
    assert regular[2, 2] == 0.01 * hessian.double().diagonal().mean()


def test_nothing_but_zeros_is_a_multiple_of_the_identity() -> None:
    notes: list[str] = []
    regular, lower = damped(torch.zeros(4, 4), 0.25, notes.append)
    assert torch.equal(regular, 0.25 * torch.eye(4).double())
    assert torch.equal(lower, 0.5 * torch.eye(4).double())
    assert notes == ["4 of 4 inputs are 0 throughout the calibration text"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_is_refused(value: float) -> None:
    hessian = hessian_of(8)
    hessian[1, 2] = value
    with pytest.raises(UserError, match="not all finite"):
        damped(hessian, 0.01, silent)


def test_far_from_definite_is_refused() -> None:
    with pytest.raises(UserError, match="far below 0"):
        damped(-torch.eye(8), 0.01, lambda text: None)
