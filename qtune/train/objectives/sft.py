"""Supervised fine-tuning: the cross entropy of the supervised tokens, each times its weight.

It is divided by the sum of the weights, so a token counts the same whatever it is packed with.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.data.sample import Sample
from qtune.model.head import losses_of_targets
from qtune.recipe_train import Train
from qtune.train.objective import Figures, Step


class Sft:
    """Weighted cross entropy of tokens."""

    figures: tuple[str, ...] = ()

    def count(self, samples: Sequence[Sample]) -> float:
        """Sum of the weights of all supervised tokens; nothing predicts a sample's first."""
        return float(sum(sum(sample.weights[1:]) for sample in samples))

    def shared(self, model: nn.Module, step: Step) -> None:
        """Nothing: tokens are independent."""

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum of weight times -log p(target), float32 []; no other token is predicted."""
        losses = losses_of_targets(model, batch)
        if batch.weights is not None:
            losses = losses * batch.weights
        return losses.sum(), {}


def make(settings: Train) -> Sft:
    """The objective; it has no settings."""
    return Sft()
