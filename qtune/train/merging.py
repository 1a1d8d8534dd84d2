"""When a merge-aware training looks through which weights.

The first share of the steps is plain QLoRA: an update that is still near zero moves few codes, and
those for little reason. From then on passes have the codes that the adapter makes, which are found
anew at the start of each step, the only place where it has changed. So they are a function of the
adapter, and a run that goes on has nothing of them to restore.

What is measured, sampled and kept is always the model with its codes, in the first share too: a
held-out loss that no served model has would be the lowest.
"""

import math
from contextlib import AbstractContextManager

from peft import PeftModel

from qtune.model import served_codes
from qtune.recipe import Train


class Merging:
    """Which weights the model of a run of `num_steps` has, step by step; all are its own without
    `merge_aware`."""

    def __init__(self, model: PeftModel, settings: Train, num_steps: int) -> None:
        self._model, self._is_on = model, settings.merge_aware
        self._first = math.floor(settings.merge_aware_from * num_steps)

    def begin(self, step: int) -> None:
        """The step of that number, from 0 on, begins: its passes have the codes they should."""
        if self._is_on and step >= self._first:
            self.finish()

    def measured(self) -> AbstractContextManager[None]:
        """Meanwhile the model is the one that would be served."""
        return served_codes.serving(self._model)

    def finish(self) -> None:
        """Training is at its end: the model is the one that is served."""
        served_codes.renew(self._model)
        served_codes.serve(self._model, True)
