"""The blocks of a transformers model: what is recomputed, or gathered from processes, at a time."""

from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """The parts of a transformers model that can be run one at a time, outermost ones."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from blocks(child)
