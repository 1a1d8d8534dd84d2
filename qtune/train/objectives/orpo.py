"""Odds ratio preference optimization (arXiv 2403.07691, eq. 6): no reference model.

Both terms go by log p, the mean log-probability of an answer's tokens (eq. 2): the chosen answer's
-log p, and beta (lambda in the paper) times -log sigmoid of the log odds ratio between the two.

TRL's experimental ORPOTrainer has the same second term. Its first differs from the paper: the mean
over all tokens of the batch, those of the prompts too, so it depends on how a step is split. Here
it covers the answer and is averaged per row, as the paper's expectation says.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qtune.data.collate import Batch
from qtune.recipe_train import Train
from qtune.train.answers import PAIR_FIGURES, PerRow, answers, pair_figures, split_pairs
from qtune.train.objective import Figures

PREFERENCE = ("beta",)
# an answer that is certain has infinite odds; this is as near as float32 comes to log 1
CERTAIN = -torch.finfo(torch.float32).eps


class Orpo(PerRow):
    """Negative log-likelihood of the chosen answer and the odds ratio of the pair."""

    figures = (*PAIR_FIGURES, "nll")

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum over pairs, float32 [], and its figures; rewards are beta log p, as TRL's."""
        chosen, rejected = split_pairs(batch, answers(model, batch).mean)
        odds = log_odds(chosen) - log_odds(rejected)
        losses = -chosen - self.beta * logsigmoid(odds)
        figures = pair_figures(self.beta * chosen, self.beta * rejected)
        return losses.sum(), {**figures, "nll": -chosen.detach().sum()}


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, exact where p is near 0 or 1."""
    log_p = log_p.clamp(max=CERTAIN)
    return log_p - torch.log(-torch.expm1(log_p))


def make(settings: Train) -> Orpo:
    """The objective with the recipe's weight of the odds ratio."""
    return Orpo(settings.beta)
