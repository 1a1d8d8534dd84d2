"""Kahneman-Tversky optimization (arXiv 2402.01306, eq. 8): answers that are good or bad, no pairs.

A row's value is a sigmoid of how far its reward r = log p - log p_reference lies beyond z0, on the
side that its label wants. z0 estimates KL(model || reference), as in the paper by the mean reward
of answers that belong to other prompts: every prompt of a step gets the answer of the row before
it. z0 takes no gradient and is at least 0.

z0 is of the whole step and found before its gradients are made; so it is the same for every
micro-batch, process and accumulation step. TRL's KTOTrainer makes it of each device's micro-batch
and averages over devices; for a step in one batch the two agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.model.head import measuring
from qtune.recipe_train import Train
from qtune.train.answers import PAIR_FIGURES, answers, reference_answers
from qtune.train.objective import Figures, Step

PREFERENCE = ("beta", "desirable_weight", "undesirable_weight")


class Kto:
    """1 - sigmoid of a reward beyond z0 for good answers, below it for bad ones."""

    figures = (*PAIR_FIGURES, "kl")

    def __init__(self, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
        self.beta = beta
        self.weights = {True: desirable_weight, False: undesirable_weight}

    def count(self, samples: Sequence[Sample]) -> float:
        """The number of rows."""
        return float(len(samples))

    def shared(self, model: nn.Module, step: Step) -> Tensor:
        """z0 and the numbers of good and of bad rows, float32 [3]."""
        labels = [sample.label for sample in step.samples]
        parameter = next(model.parameters())
        rewards = torch.zeros((), device=parameter.device)
        for batch in step.batches(mismatched(step.samples)):
            with measuring(model):
                found = answers(model, batch).log_probs
            rewards += (found - reference_answers(model, batch).log_probs).sum()
        z0 = (step.total(rewards) / len(labels)).clamp(min=0)
        return torch.stack([z0, *z0.new_tensor([labels.count(True), labels.count(False)])])

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum over rows, float32 [], and its figures."""
        assert shared is not None and None not in batch.labels, "rows without a label"
        reference = reference_answers(model, batch).log_probs
        ratios = answers(model, batch).log_probs - reference
        good = ratios.new_tensor([label is True for label in batch.labels], dtype=torch.bool)
        weights = ratios.new_tensor([self.weights[label is True] for label in batch.labels])
        beyond = torch.where(good, 1.0, -1.0) * self.beta * (ratios - shared[0])
        # 1 - sigmoid(x) without the rounding of the difference
        losses = weights * torch.sigmoid(-beyond)
        return losses.sum(), self._figures(ratios.detach(), good, beyond.detach(), shared)

    def _figures(self, ratios: Tensor, good: Tensor, beyond: Tensor, shared: Tensor) -> Figures:
        """Sums that, divided by all rows of the step, are means over those that they are about.

        A kind of answer that the step does not have shows 0. An answer counts as accurate on the
        right side of z0.
        """
        kl, num_good, num_bad = shared
        rewards, num_rows = self.beta * ratios, num_good + num_bad
        chosen = (rewards * good).sum() * num_rows / num_good.clamp(min=1)
        rejected = (rewards * ~good).sum() * num_rows / num_bad.clamp(min=1)
        accurate = (beyond > 0).float().sum()
        values = chosen, rejected, accurate, chosen - rejected, kl * len(ratios)
        return dict(zip(self.figures, values, strict=True))


def mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample's prompt with the answer of the one before it, the first with the last one's.

    An answer begins at the first learned token. No sample gets longer than the longest of those
    given, so that the memory of a step stays as planned: what is beyond is cut off.
    """
    longest = max(len(sample.ids) for sample in samples)
    return [_joined(samples[i], samples[i - 1], longest) for i in range(len(samples))]


def _joined(prompt: Sample, answer: Sample, longest: int) -> Sample:
    end, start = _answer_start(prompt), _answer_start(answer)
    ids = [*prompt.ids[:end], *answer.ids[start:]]
    weights = [0.0] * end + list(answer.weights[start:])
    return Sample(prompt.place, ids[:longest], weights[:longest], label=prompt.label)


def _answer_start(sample: Sample) -> int:
    return next(i for i, weight in enumerate(sample.weights) if weight > 0)


def make(settings: Train) -> Kto:
    """The objective; UserError where a step has one row, whose answer could go nowhere else."""
    if settings.batch_size < 2:
        raise UserError(
            f"train.batch_size ({settings.batch_size}) must be at least 2 for kto, which compares "
            "the answers of a step's rows"
        )
    preference = settings.preference
    return Kto(settings.beta, preference.desirable_weight, preference.undesirable_weight)
