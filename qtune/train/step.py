"""Passes over rows: the gradient of a step in micro-batches, and the held-out loss likewise.

Losses are summed over the rows of all micro-batches and processes and divided once by what the
objective counts in all rows, which every process can count for itself. So neither the size of a
micro-batch nor the number of processes changes the gradient, beyond the rounding of sums. Sums are
kept in float64: that rounding shall not add to theirs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from qtune.data.sample import Sample
from qtune.model.forward import packs
from qtune.recipe import Recipe
from qtune.train import parallel
from qtune.train.batches import Batches
from qtune.train.neftune import noisy_embeddings
from qtune.train.objective import Figures, Objective, Step


@dataclass(frozen=True)
class Means:
    """Loss and figures per what the objective counts, of all processes; and summed flags."""

    loss: float
    figures: dict[str, float]
    flags: list[float]


class Passes:
    """Runs rows through the model, each process its share of them.

    `model` is what `distributed` wraps, or shards in place; gradients come from the latter.
    """

    def __init__(
        self,
        model: PeftModel,
        distributed: nn.Module,
        objective: Objective,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self._model, self._distributed, self._objective = model, distributed, objective
        self._accelerator, self._noise = accelerator, recipe.train.neftune_alpha
        packing = recipe.data.packing and packs(model)
        self._batches = Batches(accelerator, recipe.train.micro_batch_tokens, packing=packing)
        self._total = partial(parallel.total, accelerator=accelerator)

    def learn(
        self, samples: Sequence[Sample], flags: Callable[[], Sequence[float]] = tuple
    ) -> Means:
        """Add the gradients of the mean loss to the parameters'.

        What `flags` gives when the passes are done is summed over the processes with the loss.
        """
        count, shared = self._objective.count(samples), self._shared(samples)
        batches = list(self._batches(samples))
        sums = self._sums()
        for i, batch in enumerate(batches):
            with self._meeting(last=i == len(batches) - 1):
                with noisy_embeddings(self._model, self._noise, batch.lengths):
                    loss, figures = self._objective.loss(self._distributed, batch, shared)
                # processes average their gradients
                (loss * (self._accelerator.num_processes / count)).backward()
            self._add(sums, loss, figures)
        return self._means(sums, count, flags())

    def measure(self, samples: Sequence[Sample]) -> Means:
        """The mean loss and figures, without gradients and dropout."""
        was_training = self._model.training
        self._model.eval()
        sums = self._sums()
        with torch.no_grad():
            shared = self._shared(samples)
            for batch in self._batches(samples):
                self._add(sums, *self._objective.loss(self._model, batch, shared))
        self._model.train(was_training)
        parallel.settle(self._model)
        return self._means(sums, self._objective.count(samples), ())

    def _shared(self, samples: Sequence[Sample]) -> Tensor | None:
        return self._objective.shared(self._model, Step(samples, self._batches, self._total))

    def _meeting(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes bring their gradients together in the last backward pass of a step."""
        if last:
            return nullcontext()
        return parallel.without_sync(self._distributed, self._accelerator)

    def _sums(self) -> Tensor:
        """Zeros for the loss and each figure."""
        number = 1 + len(self._objective.figures)
        return torch.zeros(number, dtype=torch.float64, device=self._accelerator.device)

    def _add(self, sums: Tensor, loss: Tensor, figures: Figures) -> None:
        found = [loss, *(figures[name] for name in self._objective.figures)]
        sums += torch.stack([value.detach().double() for value in found])

    def _means(self, sums: Tensor, count: float, flags: Sequence[float]) -> Means:
        """One sum over the processes, for everything."""
        summed = self._total(torch.cat([sums, sums.new_tensor(flags)])).tolist()
        loss, *figures = (value / count for value in summed[: len(sums)])
        named = dict(zip(self._objective.figures, figures, strict=True))
        return Means(loss, named, summed[len(sums) :])
