import pytest
import torch
from torch.nn.functional import logsigmoid

from qtune.recipe_train import Preference, Train
from qtune.train.objective import load_objective
from qtune.train.objectives.orpo import log_odds


def test_loss_figures_and_gradient_are_those_of_the_paper_in_float64(twins, rows, minimize):
    samples = rows(pairs=True)
    settings = Train(objective="orpo", steps=1, preference=Preference(beta=0.4))
    loss, figures = minimize(load_objective(settings), twins.model, samples)
    losses, means = [], []
    for sample in samples:
        chosen, rejected = (twins.log_probs(part) / sum(part.weights) for part in sample.parts)
        odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
        losses.append(-chosen - 0.4 * logsigmoid((odds[0] / odds[1]).log()))
        means.append(torch.stack([chosen, rejected]).detach())
    truth = torch.stack(losses).mean()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()
    chosen, rejected = torch.stack(means).unbind(1)
    assert figures["nll"].item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    assert figures["rewards/chosen"].item() == pytest.approx(0.4 * chosen.mean().item(), rel=1e-5)
    margin = 0.4 * (chosen - rejected).mean().item()
    assert figures["margin"].item() == pytest.approx(margin, rel=1e-3)


def test_log_odds_are_exact_where_answers_are_nearly_certain_or_impossible():
    log_p = torch.tensor([-1e-6, -1e-3, -0.5, -2.0, -80.0])
    exact = log_p.double()
    truth = exact - torch.log(-torch.expm1(exact))
    torch.testing.assert_close(log_odds(log_p).double(), truth, rtol=1e-6, atol=1e-6)


def test_a_certain_answer_has_finite_odds_and_a_finite_gradient():
    log_p = torch.zeros(1, requires_grad=True)
    odds = log_odds(log_p)
    odds.sum().backward()
    assert odds.isfinite().all() and log_p.grad.isfinite().all()
