"""Against transformers' own loss, and KL in float64 numpy."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtune.data.chat import encode
from qtune.data.collate import Batch, collate
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.evaluate import perplexity
from qtune.evaluate.perplexity import Likelihood, held_out
from qtune.recipe import Data


@pytest.fixture
def samples(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Sample]:
    settings = Data(train="", max_length=200)
    return [sample for row in rows for sample in encode(tokenizer, row, settings=settings)]


@pytest.fixture
def batches(samples: list[Sample]) -> list[Batch]:
    return [collate(samples[:3]), collate(samples[3:])]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # so that small batches come in several pieces
    monkeypatch.setattr(perplexity, "ROWS", 7)


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a little noise in its weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise
    return other


def log_probabilities(model: nn.Module, samples: list[Sample]) -> NDArray[np.float64]:
    """[N, V] at the supervised tokens, each sample alone, normalised in float64."""
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.ids])).logits[0].double().numpy()
        at = [i - 1 for i in range(1, len(sample.ids)) if sample.supervised[i]]
        found.append(logits[at])
    logits = np.concatenate(found)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def test_loss_is_that_of_transformers(
    model: PreTrainedModel, samples: list[Sample], batches: list[Batch]
) -> None:
    total = tokens = 0.0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        labels = torch.where(torch.tensor([sample.supervised]), ids, -100)
        count = int(torch.tensor(sample.supervised).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    found = held_out(model, batches)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (found.kl, found.top1, found.kept) == (None, None, None)


def test_tokens_count_as_often_as_their_weight_says(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    weighted = [
        replace(sample, weights=[weight * (1 + i) / 2 for weight in sample.weights])
        for i, sample in enumerate(samples)
    ]
    parts = [held_out(model, [collate([sample])]) for sample in samples]
    weights = [part.tokens * (1 + i) / 2 for i, part in enumerate(parts)]
    expected = sum(w * part.loss for w, part in zip(weights, parts, strict=True)) / sum(weights)
    found = held_out(model, [collate(weighted)])
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.tokens == sum(part.tokens for part in parts)


def test_losses_of_samples_are_those_of_each_alone(
    model: PreTrainedModel, samples: list[Sample]
) -> None:
    alone = [held_out(model, [collate([sample])]) for sample in samples]
    # a batch is filled up by a sample that has no targets
    for groups in ([samples], [samples[:3], samples[3:]]):
        found = held_out(model, [collate(group, multiple=128) for group in groups]).samples
        assert [s.weight for s in found] == [one.tokens for one in alone]
        means = [s.loss / s.weight for s in found]
        assert means == pytest.approx([one.loss for one in alone], rel=1e-5)


def test_padded_rows_give_the_same(model: PreTrainedModel, samples: list[Sample]) -> None:
    packed, padded = (
        held_out(model, [collate(samples, packing=packing)], keep_tokens=9)
        for packing in (True, False)
    )
    assert padded.loss == pytest.approx(packed.loss, rel=1e-6)
    assert held_out(model, [collate(samples)], reference=padded.kept).top1 == 1


def test_batching_does_not_matter(
    model: PreTrainedModel, samples: list[Sample], batches: list[Batch]
) -> None:
    one_by_one = held_out(model, [collate([sample]) for sample in samples])
    assert one_by_one.loss == pytest.approx(held_out(model, batches).loss, rel=1e-6)


@pytest.mark.parametrize("keep", [10_000, 20, 7, 1])
def test_distance_from_a_reference(
    model: PreTrainedModel, samples: list[Sample], batches: list[Batch], keep: int
) -> None:
    other = changed(model)
    reference = held_out(model, batches, keep_tokens=keep).kept
    assert reference is not None
    found = held_out(other, batches, reference=reference)
    p, q = (log_probabilities(m, samples)[:keep] for m in (model, other))
    assert found.compared == len(p) == len(reference.targets)
    assert reference.log_probabilities.dtype == torch.float16
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=0.01)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0 < found.kl < 1
    assert found.loss == held_out(other, batches).loss


def test_distance_from_itself_is_the_rounding_of_the_reference(
    model: PreTrainedModel, batches: list[Batch]
) -> None:
    likelihood = held_out(model, batches, keep_tokens=1000)
    found = held_out(model, batches, reference=likelihood.kept)
    assert found.kl is not None and -1e-8 < found.kl < 2e-6
    assert found.top1 == 1


def test_tokens_that_cannot_come_make_no_nan(model: PreTrainedModel, batches: list[Batch]) -> None:
    # as in models whose vocabulary is filled up to a round number
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.index_fill(-1, torch.tensor([0]), -math.inf)

    model.lm_head = nn.Sequential(model.lm_head, Masked())
    likelihood = held_out(model, batches, keep_tokens=1000)
    found = held_out(changed(model), batches, reference=likelihood.kept)
    assert found.kl is not None and 0 < found.kl < 1


def test_broken_model_shows(model: PreTrainedModel, batches: list[Batch]) -> None:
    model.lm_head.weight.data.fill_(math.nan)
    assert math.isnan(held_out(model, batches).loss)


def test_reference_from_other_tokens_is_refused(
    model: PreTrainedModel, batches: list[Batch]
) -> None:
    reference = held_out(model, batches, keep_tokens=1000).kept
    with pytest.raises(ValueError, match="other held-out tokens"):
        held_out(model, batches[::-1], reference=reference)
    with pytest.raises(ValueError, match="more held-out tokens"):
        held_out(model, batches[:1], reference=reference)


def test_nothing_supervised_is_refused(model: PreTrainedModel, samples: list[Sample]) -> None:
    ids = samples[0].ids
    with pytest.raises(ValueError, match="no supervised token"):
        held_out(model, [collate([Sample("t:0", ids, [0.0] * len(ids))])])


def test_batch_without_targets_is_passed_over(
    model: PreTrainedModel, samples: list[Sample], batches: list[Batch]
) -> None:
    ids = samples[0].ids
    empty = collate([Sample("t:0", ids, [0.0] * len(ids))])
    assert held_out(model, [empty, *batches]) == held_out(model, batches)


def test_training_mode_comes_back(model: PreTrainedModel, batches: list[Batch]) -> None:
    model.train()
    held_out(model, batches)
    assert model.training


def test_perplexity_beyond_floats() -> None:
    assert Likelihood(loss=1e4, tokens=1).perplexity == math.inf
