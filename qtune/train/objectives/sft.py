"""Supervised fine-tuning: the summed cross entropy of the supervised tokens."""

from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.model.forward import forward_logits
from qtune.train.cross_entropy import summed_cross_entropy


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of -log p(target), float32 [], and the number of targets; logits exist for these only."""
    logits = forward_logits(model, batch)
    return summed_cross_entropy(logits, batch.targets), len(batch.targets)
