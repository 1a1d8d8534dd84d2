import pytest
import torch

from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.recipe_train import Preference, Train
from qtune.train.objective import load_objective
from qtune.train.objectives.kto import mismatched

WEIGHTS = Preference(beta=0.5, desirable_weight=1.2, undesirable_weight=0.7)


def settings(**fields):
    return Train(objective="kto", steps=1, **fields)


def truth_of(twins, samples):
    """Loss and z0 by the paper's equations, in float64."""
    others = [
        twins.log_probs(other).detach() - twins.log_probs(other, reference=True)
        for other in mismatched(samples)
    ]
    z0 = torch.stack(others).mean().clamp(min=0)
    ratios = [twins.log_probs(each) - twins.log_probs(each, reference=True) for each in samples]
    values = []
    for sample, ratio in zip(samples, ratios, strict=True):
        if sample.label:
            values.append(1.2 * (1 - torch.sigmoid(0.5 * (ratio - z0))))
        else:
            values.append(0.7 * (1 - torch.sigmoid(0.5 * (z0 - ratio))))
    return torch.stack(values).mean(), z0, torch.stack(ratios).detach()


# with the adapter's sign turned, answers get less likely, and z0 stays at its least
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_figures_and_gradient_are_those_of_the_paper_in_float64(sign, twins, rows, minimize):
    samples = rows(labels=True)
    for model in (twins.model, twins.truth):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= sign
    loss, figures = minimize(load_objective(settings(preference=WEIGHTS)), twins.model, samples)
    truth, z0, ratios = truth_of(twins, samples)
    truth.backward()
    assert (z0 > 1e-3) == (sign == 1), z0
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    twins.assert_same_gradients()
    assert figures["kl"].item() == pytest.approx(z0.item(), rel=1e-4, abs=1e-6)
    good = torch.tensor([sample.label for sample in samples])
    chosen, rejected = 0.5 * ratios[good].mean().item(), 0.5 * ratios[~good].mean().item()
    assert figures["rewards/chosen"].item() == pytest.approx(chosen, rel=1e-4)
    assert figures["rewards/rejected"].item() == pytest.approx(rejected, rel=1e-4)
    assert figures["margin"].item() == pytest.approx(chosen - rejected, rel=1e-3)
    accuracy = ((ratios > z0) == good).double().mean().item()
    assert figures["accuracy"].item() == pytest.approx(accuracy)


def test_a_kind_of_answer_that_a_step_lacks_shows_zero(twins, rows, minimize):
    samples = [sample for sample in rows(labels=True) if sample.label]
    _, figures = minimize(load_objective(settings()), twins.model, samples)
    assert figures["rewards/rejected"].item() == 0
    assert figures["rewards/chosen"].item() != 0


def test_prompts_get_the_answer_of_the_row_before():
    def sample(place, prompt, answer):
        return Sample(place, [*prompt, *answer], [0] * len(prompt) + [1] * len(answer), label=True)

    given = [sample("a", [1, 2], [3]), sample("b", [4], [5, 6]), sample("c", [7], [8])]
    found = mismatched(given)
    assert [list(each.ids) for each in found] == [[1, 2, 8], [4, 3], [7, 5, 6]]
    assert [list(each.weights) for each in found] == [[0, 0, 1], [0, 1], [0, 1, 1]]
    assert [each.place for each in found] == ["a", "b", "c"]


def test_mismatched_rows_are_no_longer_than_the_longest_row():
    long_prompt = Sample("a", range(1, 9), [0] * 7 + [1], label=True)
    long_answer = Sample("b", range(11, 19), [0] + [1] * 7, label=False)
    first, second = mismatched([long_prompt, long_answer])
    assert list(first.ids) == [1, 2, 3, 4, 5, 6, 7, 12] and list(first.weights) == [0] * 7 + [1]
    assert list(second.ids) == [11, 8]


def test_a_step_of_one_row_is_refused():
    with pytest.raises(UserError, match=r"train.batch_size \(1\) must be at least 2 for kto"):
        load_objective(settings(batch_size=1))


def test_rows_without_a_label_are_a_mistake(twins, rows, minimize):
    with pytest.raises(AssertionError, match="without a label"):
        minimize(load_objective(settings()), twins.model, rows())
