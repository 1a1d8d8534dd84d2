"""Simple preference optimization (arXiv 2405.14734, eq. 6): no reference model.

An answer's reward is beta times the mean log-probability of its tokens, and the chosen one is to be
better by a margin (gamma in the paper; `margin` is gamma itself, not gamma / beta). TRL's
experimental CPOTrainer has this loss as `loss_type="simpo"` with `cpo_alpha=0`; its default adds a
likelihood term that the paper does not have.
"""

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qtune.data.collate import Batch
from qtune.recipe_train import Train
from qtune.train.answers import PerRow, answers, pair_figures, split_pairs
from qtune.train.objective import Figures

PREFERENCE = ("beta", "margin")


class Simpo(PerRow):
    """-log sigmoid of the difference between mean log-probabilities beyond a margin."""

    def __init__(self, beta: float, margin: float) -> None:
        self.beta, self.margin = beta, margin

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum over pairs, float32 [], and its figures."""
        chosen, rejected = split_pairs(batch, self.beta * answers(model, batch).mean)
        losses = -logsigmoid(chosen - rejected - self.margin)
        return losses.sum(), pair_figures(chosen, rejected)


def make(settings: Train) -> Simpo:
    """The objective with the recipe's strength and margin."""
    return Simpo(settings.beta, settings.preference.margin)
