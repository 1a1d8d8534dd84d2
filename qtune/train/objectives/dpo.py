"""Direct preference optimization (arXiv 2305.18290, eq. 7), the sigmoid loss.

An answer's implicit reward is beta times how much likelier the model makes it than the reference.
With label smoothing e, a pair is taken to be the wrong way round with probability e: the
conservative loss of cDPO (E. Mitchell, "A note on DPO with noisy preferences", 2023), which stops
pushing once the margin says 1 - e. TRL's `loss_type="sigmoid"` is the loss without smoothing; its
DPOTrainer (1.16) takes `label_smoothing` and does not use it there.
"""

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qtune.data.collate import Batch
from qtune.recipe_train import Train
from qtune.train.answers import PerRow, answers, pair_figures, reference_answers, split_pairs
from qtune.train.objective import Figures

PREFERENCE = ("beta", "label_smoothing")


class Dpo(PerRow):
    """-log sigmoid of the margin between the implicit rewards of a pair."""

    def __init__(self, beta: float, label_smoothing: float) -> None:
        self.beta, self.label_smoothing = beta, label_smoothing

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum over pairs, float32 [], and its figures."""
        reference = reference_answers(model, batch).log_probs
        rewards = self.beta * (answers(model, batch).log_probs - reference)
        chosen, rejected = split_pairs(batch, rewards)
        margin = chosen - rejected
        right, wrong = -logsigmoid(margin), -logsigmoid(-margin)
        losses = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
        return losses.sum(), pair_figures(chosen, rejected)


def make(settings: Train) -> Dpo:
    """The objective with the recipe's strength and label smoothing."""
    return Dpo(settings.beta, settings.preference.label_smoothing)
