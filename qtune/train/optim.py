"""AdamW, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from qtune.recipe import Train


def adamw(parameters: Iterable[nn.Parameter], settings: Train) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the trainable parameters; matrices decay, vectors do not."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # one pass over each adapter matrix where the plain loop makes eight
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(step: int, num_steps: int, settings: Train) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    match settings.schedule:
        case "cosine":
            return settings.lr * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return settings.lr * (1 - done)
        case "constant":
            return settings.lr
