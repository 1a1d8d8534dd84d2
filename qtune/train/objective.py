"""What an objective is: one file in `objectives/`, named by the word of the recipe.

The file has `make(settings)` and, in PREFERENCE, the names of the settings of `train.preference`
that it uses.

A loss is a sum over rows, and the loop divides once by `count` of the whole step. So an objective
sees neither how a step is split into micro-batches nor over how many processes. What a row's loss
needs to know of the other rows is found by `shared`, before any gradient is made.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.recipe_train import Preference, Train

# per-row figures, or per-target ones for sft, summed over what a loss was computed on
Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The rows of a step or of an evaluation, and how the processes go through rows together."""

    samples: Sequence[Sample]
    """All rows, of all processes, in the same order everywhere."""
    batches: Callable[[Sequence[Sample]], Iterable[Batch]]
    """This process' share of any samples, in micro-batches; the same number in all processes."""
    total: Callable[[Tensor], Tensor]
    """Sum of a tensor over the processes."""


class Objective(Protocol):
    """What is minimized."""

    figures: tuple[str, ...]
    """Names of the figures that `loss` returns, in that order."""

    def count(self, samples: Sequence[Sample]) -> float:
        """What the summed loss and the summed figures of these samples are divided by."""

    def shared(self, model: nn.Module, step: Step) -> Tensor | None:
        """What the loss of each row needs to know of all rows; None where rows are independent."""

    def loss(self, model: nn.Module, batch: Batch, shared: Tensor | None) -> tuple[Tensor, Figures]:
        """Sum over the batch's rows, float32 [] with gradient, and its figures, float32 [] each."""


def load_objective(settings: Train) -> Objective:
    """The objective that `train.objective` names; UserError where other settings do not suit it."""
    _check_preference(settings, preference_settings(settings))
    return cast(Objective, _module(settings).make(settings))


def preference_settings(settings: Train) -> tuple[str, ...]:
    """The names of the settings of `train.preference` that the objective uses."""
    return getattr(_module(settings), "PREFERENCE", ())


def _module(settings: Train) -> Any:
    return import_module(f"qtune.train.objectives.{settings.objective}")


def _check_preference(settings: Train, used: tuple[str, ...]) -> None:
    """Raises UserError for settings of other objectives, which would do nothing."""
    for field in fields(Preference):
        value = getattr(settings.preference, field.name)
        if value != field.default and field.name not in used:
            known = ", ".join(used) or "none"
            raise UserError(
                f"train.preference.{field.name} ({value}) has no effect on train.objective: "
                f"{settings.objective}; leave it out (settings there: {known})"
            )
