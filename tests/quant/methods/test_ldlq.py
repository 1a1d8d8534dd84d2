"""Block LDLQ against its definition, column by column in float64."""

import pytest
import torch

from qtune.quant.methods import ldlq as module
from qtune.quant.methods.ldlq import DEVIATION, ldlq
from qtune.quant.storage import Storage
from qtune.quant.vector_linear import VectorLinear
from qtune.recipe_quant import Quant
from qtune_kernels.e8p_book import STEP, decode_words, nearest_words
from qtune_kernels.hadamard import hadamard

SETTINGS = Quant(format="e8p", method="gptq")
SHAPE = (96, 192)


def layer() -> VectorLinear:
    return VectorLinear(SHAPE[1], SHAPE[0], storage=Storage(format="e8p"), device="meta")


def quantized(weight: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    made = layer()
    made.load(ldlq(made, weight, hessian, SETTINGS, pytest.fail))
    return made.dequantize(torch.float32)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs that hang together and differ in strength."""
    torch.manual_seed(0)
    weight = torch.randn(SHAPE) * 0.02
    mixing = torch.randn(SHAPE[1], SHAPE[1]) * torch.rand(SHAPE[1]).pow(4)
    x = torch.randn(2048, SHAPE[1]) @ mixing
    return weight, x.T @ x / len(x)


def output_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    off = weight - found
    return float(((off @ hessian) * off).sum() / ((weight @ hessian) * weight).sum())


def test_outputs_change_far_less_than_with_the_nearest_points(problem) -> None:
    weight, hessian = problem
    plain = output_error(weight, quantized(weight, None), hessian)
    found = output_error(weight, quantized(weight, hessian), hessian)
    assert plain == pytest.approx(0.092, abs=0.02)
    assert found < 0.5 * plain


def test_visiting_vectors_again_helps_every_row(problem, monkeypatch) -> None:
    weight, hessian = problem
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    again = weight - quantized(weight, hessian)
    monkeypatch.setattr(module, "SWEEPS", 0)
    once = weight - quantized(weight, hessian)
    rotated = [hadamard(off.T, seed=1).T for off in (again, once)]
    errors = [((off @ hessian) * off).sum(1) for off in rotated]
    assert (errors[0] <= errors[1] * 1.001).all() and errors[0].sum() < 0.98 * errors[1].sum()


def test_vectors_are_chosen_one_after_the_other_errors_made_up_for(problem, monkeypatch) -> None:
    weight, hessian = problem
    monkeypatch.setattr(module, "SWEEPS", 0)
    made = layer()
    made.load(ldlq(made, weight, hessian, SETTINGS, pytest.fail))
    # the definition: minimise over what comes later, exactly, after each block (float64)
    inner = made.inner_weight(weight).double()
    h = made.inner_hessian(hessian).double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    scale = inner.square().mean().sqrt() / DEVIATION
    rest, found = inner / scale, torch.empty_like(inner)
    for at in range(0, SHAPE[1], 8):
        here, behind = slice(at, at + 8), slice(at + 8, None)
        vectors = rest[:, here].float().contiguous()
        found[:, here] = decode_words(nearest_words(vectors)).double() * STEP
        off = rest[:, here] - found[:, here]
        rest[:, behind] += torch.linalg.solve(h[behind, behind], h[behind, here] @ off.T).T
    agreeing = (made.dequantize_inner(torch.float32) / scale.float() - found).abs() < 1e-3
    # float32 decides a tie otherwise now and then, and what follows in that row differs
    assert agreeing.all(1).float().mean() > 0.9


def test_without_a_hessian_each_vector_takes_the_nearest_point(problem) -> None:
    weight, _ = problem
    expected = layer()
    expected.load(expected.pack(weight))
    assert torch.equal(quantized(weight, None), expected.dequantize(torch.float32))


def test_a_singular_hessian_is_no_trouble(problem) -> None:
    weight, _ = problem
    x = torch.randn(20, SHAPE[1])
    hessian = x.T @ x / len(x)
    found = quantized(weight, hessian)
    assert output_error(weight, found, hessian) < 0.02
