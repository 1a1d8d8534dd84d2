import pytest
import torch
from torch.nn.functional import logsigmoid

from qtune.recipe_train import Preference, Train
from qtune.train.objective import load_objective


def settings(**preference):
    return Train(objective="dpo", steps=1, preference=Preference(**preference))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_figures_and_gradient_are_those_of_the_paper_in_float64(
    smoothing, twins, rows, minimize
):
    samples = rows(pairs=True)
    objective = load_objective(settings(beta=0.3, label_smoothing=smoothing))
    loss, figures = minimize(objective, twins.model, samples)
    losses, rewards = [], []
    for sample in samples:
        pair = [
            0.3 * (twins.log_probs(part) - twins.log_probs(part, reference=True))
            for part in sample.parts
        ]
        margin = pair[0] - pair[1]
        right, wrong = logsigmoid(margin), logsigmoid(-margin)
        losses.append(-(1 - smoothing) * right - smoothing * wrong)
        rewards.append(torch.stack(pair).detach())
    truth = torch.stack(losses).mean()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()
    chosen, rejected = torch.stack(rewards).unbind(1)
    assert figures["rewards/chosen"].item() == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert figures["rewards/rejected"].item() == pytest.approx(rejected.mean().item(), rel=1e-4)
    assert figures["margin"].item() == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert figures["accuracy"].item() == pytest.approx((chosen > rejected).double().mean().item())


def test_an_adapter_that_does_nothing_has_loss_log_2(twins, rows, minimize):
    for name, parameter in twins.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    loss, figures = minimize(load_objective(settings()), twins.model, rows(pairs=True))
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)
    assert figures["margin"].item() == 0


def test_rows_without_a_rejected_answer_are_a_mistake(twins, rows, minimize):
    with pytest.raises(AssertionError, match="without a rejected answer"):
        minimize(load_objective(settings()), twins.model, rows())
