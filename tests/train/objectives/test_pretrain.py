import pytest
import torch

from qtune.data.sample import Sample
from qtune.recipe_train import Train
from qtune.train.objective import load_objective


def test_packed_texts_have_the_perplexity_that_they_have_alone(twins, rows, minimize):
    objective = load_objective(Train(objective="pretrain", steps=1))
    texts = [Sample(row.place, row.ids, [0.0] + [1.0] * (len(row.ids) - 1)) for row in rows()]
    loss, _ = minimize(objective, twins.model, texts, size=5)
    truth = -torch.stack([twins.log_probs(text) for text in texts]).sum()
    truth = truth / sum(len(text.ids) - 1 for text in texts)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()
