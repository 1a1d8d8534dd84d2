"""What the correctness part must notice."""

import pytest
import torch
from gpu import correctness
from gpu.problem import Exact, Problem
from torch import Tensor


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return 2.1 * dy


def problem(op, plain=lambda x: 2 * x) -> Problem:
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    return Problem(op, plain, (x,), {})


def test_equal_results_pass() -> None:
    assert correctness._close(problem(lambda x: x + x))["ok"]


@pytest.mark.parametrize(
    "op",
    [
        lambda x: 2.05 * x,
        lambda x: (x + x).masked_fill(torch.eye(7, 5, dtype=torch.bool), torch.nan),
        lambda x: (2 * x).flatten(),
        _Wrong.apply,
    ],
    ids=["inexact", "not written", "another shape", "gradient"],
)
def test_what_is_wrong_fails(op) -> None:
    assert not correctness._close(problem(op))["ok"]


def test_reads_beyond_an_input_meet_nan() -> None:
    held = correctness._guarded(torch.ones(3))
    beyond = torch.as_strided(held, (5,), (1,), held.storage_offset() - 1)
    assert beyond.isnan().tolist() == [True, False, False, False, True]


def test_exact_means_the_same_bits() -> None:
    ones = torch.ones(2)
    assert correctness._exact(Exact(lambda: ones, lambda: ones.clone(), {}))["ok"]
    assert not correctness._exact(Exact(lambda: ones, lambda: ones + 1e-7, {}))["ok"]
