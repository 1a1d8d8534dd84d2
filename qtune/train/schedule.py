"""The learning rate as a pure function of the step, so that a checkpoint need not hold it.

All schedules begin with `warmup_steps` of linear warm-up, but for one_cycle (arXiv 1708.07120),
which has its own way up: a cosine, over `warmup_steps` or else three tenths of the run, as in
torch.optim.lr_scheduler.OneCycleLR. wsd (arXiv 2404.06395) stays at the peak until a linear decay.
"""

import math

from qtune.recipe import Train

# of the run: one_cycle's way up, and wsd's decay where the recipe gives no steps
UP, DECAY = 0.3, 0.2
# one_cycle: the peak over the first rate, and over the last
FIRST, LAST = 25, 25e4


def learning_rate(step: int, num_steps: int, settings: Train) -> float:
    """Learning rate of optimizer step `step` of `num_steps`, counted from 0."""
    if settings.schedule == "one_cycle":
        return settings.lr * _one_cycle(step, num_steps, settings.warmup_steps)
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    match settings.schedule:
        case "cosine":
            return settings.lr * _cosine(1, 0, done)
        case "linear":
            return settings.lr * (1 - done)
        case "wsd":
            decay = settings.decay_steps or max(1, round(DECAY * num_steps))
            return settings.lr * min(1.0, max(0, num_steps - step) / decay)
        case "constant":
            return settings.lr


def _one_cycle(step: int, num_steps: int, warmup: int) -> float:
    """Share of the peak, which is reached before the step of that index."""
    top = max(0, (warmup or UP * num_steps) - 1)
    if step < top:
        return _cosine(1 / FIRST, 1, step / top)
    done = (step - top) / max(1, num_steps - 1 - top)
    return _cosine(1, 1 / LAST, min(1, done))


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2
