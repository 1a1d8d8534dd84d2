"""What the suite is made of: named cases, each of which leaves one row of results."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Context(NamedTuple):
    """What every part is told: where to run, how much, and which model the quickstart takes."""

    device: torch.device
    quick: bool
    """Tiny shapes and few repeats: whether the code runs, not how fast."""
    seed: int
    model: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to be timed."""
        return self.device.type == "cuda"


class Case(NamedTuple):
    """A name, and what makes the row. `ok` in a row says whether results are right."""

    name: str
    run: Callable[[], dict[str, Any]]


def finite(value: float) -> float | None:
    """The value as JSON can hold it: nothing where it is NaN or infinite."""
    return value if math.isfinite(value) else None
