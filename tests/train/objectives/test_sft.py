from dataclasses import replace

import pytest
import torch

from qtune.data.sample import Sample
from qtune.recipe_train import Train
from qtune.train.objective import load_objective


@pytest.fixture
def sft():
    return load_objective(Train(steps=1))


def truth_of(twins, samples):
    """Weighted mean of -log p, in float64."""
    total = -torch.stack([twins.log_probs(sample) for sample in samples]).sum()
    return total / sum(sum(sample.weights) for sample in samples)


def test_the_mean_and_its_gradient_are_those_of_a_plain_float64_computation(
    sft, twins, rows, minimize
):
    samples = rows()
    loss, figures = minimize(sft, twins.model, samples)
    truth = truth_of(twins, samples)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5) and figures == {}
    twins.assert_same_gradients()


def test_tokens_count_as_much_as_they_weigh(sft, twins, rows, minimize):
    samples = [
        replace(row, weights=[weight * (1 + at % 3) / 2 for at, weight in enumerate(row.weights)])
        for row in rows()
    ]
    loss, _ = minimize(sft, twins.model, samples)
    truth = truth_of(twins, samples)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()


def test_what_is_counted_are_weights_of_tokens_that_something_predicts(sft):
    samples = [Sample("a", [5, 6, 7], [1.0, 0.5, 2.0]), Sample("b", [8, 9], [0, 1])]
    assert sft.count(samples) == 3.5
