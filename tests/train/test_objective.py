"""Loading objectives, and what all of them promise about how a step is split."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from qtune.data.collate import collate
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Lora
from qtune.recipe_train import ObjectiveName, Preference, Train
from qtune.train.objective import Step, load_objective

OBJECTIVES = get_args(ObjectiveName)


def rows(objective: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def part(i: int, num_prompt: int, num_answer: int) -> Sample:
        length = num_prompt + num_answer
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        label = i % 2 == 0 if objective == "kto" else None
        return Sample(f"t:{i}", ids, [0.0] * num_prompt + [1.0] * num_answer, label=label)

    found = [part(i, 3 + 2 * i, 5 + i % 2) for i in range(5)]
    if objective in ("dpo", "orpo", "simpo"):
        found = [replace(each, rejected=part(i, 3 + 2 * i, 4)) for i, each in enumerate(found)]
    return found


def learn(model: PeftModel, samples: list[Sample]) -> None:
    """Make the samples' answers likelier than the base has them, so that kto's KL is not 0."""
    sft = load_objective(Train(steps=1))
    loss, _ = sft.loss(model, collate(samples), None)
    (loss / sft.count(samples)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= parameter.grad
    model.zero_grad()


def step_of(name: str, folder: Path, groups: list[list[int]], ranks: int = 1) -> list[Tensor]:
    """Loss, figures and gradients of a step whose rows are taken so, by so many ranks in turn."""
    base = load_base(folder, None, device=torch.device("cpu"), dtype=torch.float32)
    model = add_adapter(base, Lora(rank=4, alpha=8)).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    learn(model, rows(name))
    objective, samples = load_objective(Train(objective=name, steps=1)), rows(name)
    count, partial = objective.count(samples), []

    def batches(rank, given):
        return [collate([given[i] for i in group]) for group in groups[rank::ranks]]

    def shared_of(rank, total):
        return objective.shared(model, Step(samples, lambda g: batches(rank, g), total))

    for rank in range(ranks):
        shared_of(rank, lambda tensor: partial.append(tensor) or tensor)
    results = []
    for rank in range(ranks):
        shared = shared_of(rank, lambda tensor: sum(partial, torch.zeros(())))
        for batch in batches(rank, samples):
            loss, figures = objective.loss(model, batch, shared)
            assert loss.dtype == torch.float32 and loss.shape == ()
            assert tuple(figures) == objective.figures
            (loss / count).backward()
            results.append(torch.stack([loss.detach(), *figures.values()]) / count)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [torch.stack(results).sum(0), *gradients]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_neither_micro_batches_nor_ranks_change_a_step(name, tiny_model):
    expected = step_of(name, tiny_model, [[0, 1, 2, 3, 4]])
    if name == "kto":
        assert expected[0][-1] > 0.01, "no KL, no test of it"
    for groups, ranks in [([[3], [0], [4], [1], [2]], 1), ([[4, 0], [1], [3], [2]], 2)]:
        found = step_of(name, tiny_model, groups, ranks)
        for value, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "preference", "key"),
    [
        ("sft", {"beta": 0.1}, "beta"),
        ("orpo", {"label_smoothing": 0.1}, "label_smoothing"),
        ("dpo", {"margin": 0.3}, "margin"),
        ("simpo", {"desirable_weight": 2.0}, "desirable_weight"),
    ],
)
def test_settings_of_other_objectives_are_mistakes(objective, preference, key):
    settings = Train(objective=objective, steps=1, preference=Preference(**preference))
    with pytest.raises(
        UserError, match=f"train.preference.{key} .* has no effect on .*{objective}"
    ):
        load_objective(settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counts_are_of_tokens_or_rows(name):
    samples = rows(name)
    num_tokens = sum(sum(sample.weights) for sample in samples)
    expected = num_tokens if name in ("sft", "pretrain") else 5
    assert load_objective(Train(objective=name, steps=1)).count(samples) == expected
