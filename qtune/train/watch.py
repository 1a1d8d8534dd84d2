"""What a run watches while it trains: the best held-out loss, patience, and spikes of the gradient.

The state is JSON, so a resumed run decides as an uninterrupted one would. All decisions go by
figures that are the same on every process.

A spike is measured against the median of the last norms, spikes among them: if the norm stays
high, half a window later that is the new normal, and training goes on.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from qtune.recipe import Train

# gradient norms that the median is taken of, and how many there must be
WINDOW, LEAST = 50, 10


@dataclass(frozen=True)
class Verdict:
    """What a held-out loss means for the run."""

    best: bool
    """It is the lowest so far."""
    stop: bool
    """Patience is at its end."""


class Watch:
    """Keeps the figures that decide whether a step counts and when a run ends."""

    def __init__(self, settings: Train, state: dict[str, Any]) -> None:
        self._factor, self._patience = settings.spike_factor, settings.patience
        self._norms = deque[float](state.get("norms", []), maxlen=WINDOW)
        self.num_spikes: int = state.get("num_spikes", 0)
        self.best_loss: float | None = state.get("best_loss")
        self.best_step: int | None = state.get("best_step")
        self._num_worse: int = state.get("num_worse", 0)

    def is_spike(self, norm: float) -> bool:
        """Whether the step with this gradient norm is to be left out; to be asked once a step."""
        if self._factor is None:
            return False
        enough = len(self._norms) >= LEAST
        found = enough and norm > self._factor * median(self._norms)
        self._norms.append(norm)
        self.num_spikes += found
        return found

    def evaluated(self, step: int, loss: float) -> Verdict:
        """What the held-out loss after `step` means; one that is no number is never the best."""
        best = loss < (math.inf if self.best_loss is None else self.best_loss)
        if best:
            self.best_loss, self.best_step, self._num_worse = loss, step, 0
        else:
            self._num_worse += 1
        stop = self._patience is not None and self._num_worse >= self._patience
        return Verdict(best, stop)

    def state(self) -> dict[str, Any]:
        """What a new Watch needs to go on from here, as JSON."""
        return {
            "norms": list(self._norms),
            "num_spikes": self.num_spikes,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "num_worse": self._num_worse,
        }
