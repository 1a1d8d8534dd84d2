"""How a model is run while it is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        # not inference_mode: what models cache along the way is used again in training
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
