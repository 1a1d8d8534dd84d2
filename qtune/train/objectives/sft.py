"""Supervised fine-tuning: the summed cross entropy of the supervised tokens."""

from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.model.forward import forward_hidden, forward_logits
from qtune.model.head import output_head
from qtune_kernels.cross_entropy import summed_cross_entropy


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of -log p(target), float32 [], and the number of targets; no other token is predicted."""
    head = output_head(model)
    if head is None:
        total = summed_cross_entropy(forward_logits(model, batch), batch.targets)
    else:
        total = head.cross_entropy(forward_hidden(model, batch), batch.targets)
    return total, len(batch.targets)
