import pytest
import torch
from torch.nn.functional import logsigmoid

from qtune.recipe_train import Preference, Train
from qtune.train.objective import load_objective


def test_loss_figures_and_gradient_are_those_of_the_paper_in_float64(twins, rows, minimize):
    samples = rows(pairs=True)
    settings = Train(objective="simpo", steps=1, preference=Preference(beta=1.5, margin=0.7))
    loss, figures = minimize(load_objective(settings), twins.model, samples)
    means = [
        torch.stack([twins.log_probs(part) / sum(part.weights) for part in sample.parts])
        for sample in samples
    ]
    chosen, rejected = torch.stack(means).unbind(1)
    truth = -logsigmoid(1.5 * (chosen - rejected) - 0.7).mean()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()
    assert figures["margin"].item() == pytest.approx(
        1.5 * (chosen - rejected).mean().item(), rel=1e-3
    )
    right = (chosen > rejected).double().mean().item()
    assert figures["accuracy"].item() == pytest.approx(right)


def test_beta_is_2_where_the_recipe_says_nothing():
    objective = load_objective(Train(objective="simpo", steps=1))
    assert (objective.beta, objective.margin) == (2.0, 0.5)
