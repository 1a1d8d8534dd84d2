"""What a training saves, what it goes on from, and which adapter it ends with.

The adapter of the lowest held-out loss stays in memory on the CPU, and a copy of it in every
checkpoint, so a checkpoint is complete by itself.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.train import parallel, state
from qtune.train.ema import Average
from qtune.train.optimizer_state import optimizer_tensors, restore_optimizer
from qtune.train.state import State
from qtune.train.tensors import (
    put_parameters,
    put_random_numbers,
    random_numbers,
    trained_parameters,
    whole_parameters,
)


class Keeper:
    """Adapter, optimizer and average of a training; all processes call its methods together."""

    def __init__(
        self,
        folder: Path,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self._folder, self._model, self._optimizer = folder, model, optimizer
        self._accelerator, self._seed, self._settings = accelerator, recipe.seed, recipe.train
        decay = recipe.train.ema_decay
        self._average = None if decay is None else Average(trained_parameters(model), decay)
        self._best: dict[str, Tensor] = {}

    def stepped(self) -> None:
        """Take the parameters as they are after a step into the average, if there is one."""
        if self._average is not None:
            self._average.update()

    def measured(self) -> AbstractContextManager[None]:
        """Meanwhile the model holds what is measured and kept: the average, if there is one."""
        return nullcontext() if self._average is None else self._average.swapped()

    def keep_best(self) -> None:
        """Remember what is measured now as the best so far, if the recipe ends with that."""
        if self._settings.keep_best:
            with self.measured():
                self._best = whole_parameters(self._model)

    def put_kept(self) -> None:
        """Let the model hold the adapter that the run ends with."""
        kept = self._best
        if not kept:
            with self.measured():
                kept = whole_parameters(self._model)
        put_parameters(self._model, kept)

    def save(self, now: State) -> None:
        """Write a checkpoint; returns when every process may rely on it."""
        tensors = {
            "adapter": whole_parameters(self._model),
            "optimizer": optimizer_tensors(self._model, self._optimizer),
            "rng": random_numbers(self._accelerator),
        }
        if self._average is not None:
            average = self._average.tensors().items()
            tensors["average"] = {name: parallel.whole(tensor) for name, tensor in average}
        if self._best:
            tensors["best"] = self._best
        if self._accelerator.is_main_process:
            state.save(self._folder, now, tensors, self._settings.keep)
        self._accelerator.wait_for_everyone()

    def restore(self, now: State) -> None:
        """Go on from the checkpoint of this state; before the first step, from nothing."""
        if not now.step:
            # adapters start the same in all processes, dropout must not
            torch.manual_seed(self._seed + self._accelerator.process_index)
            return
        saved = state.place(self._folder, now.step)
        put_parameters(self._model, state.load(saved, "adapter"))
        restore_optimizer(self._model, self._optimizer, state.load(saved, "optimizer"))
        average = state.load(saved, "average")
        if self._average is not None and average:
            self._average.load(average)
        self._best = state.load(saved, "best") if self._settings.keep_best else {}
        seed = self._seed + now.step * self._accelerator.num_processes
        put_random_numbers(state.load(saved, "rng"), self._accelerator, seed)


def check_adapter(folder: Path, start: State, model: PeftModel) -> None:
    """Raises UserError unless the checkpoint to go on from has the model's trained tensors."""
    if not start.step:
        return
    saved = state.place(folder, start.step)
    there = {name: tensor.shape for name, tensor in state.load(saved, "adapter").items()}
    here = {name: parameter.shape for name, parameter in trained_parameters(model).items()}
    differing = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if differing:
        raise UserError(
            f"{saved} holds another adapter: {', '.join(differing[:3])} differ; put the recipe's "
            "lora section back, or start a new run with run=NAME"
        )
