"""Log-probabilities of whole answers, under the model and under its reference.

The reference of a preference objective is the same base with the adapter off, so it costs no
memory. It runs without dropout and draws no random numbers: what it says of an answer is the same
in every step, and a resumed run stays exact.

An answer's tokens are added by themselves, in their order, and not scattered into sums by atomic
additions: a step done again gives the same bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from qtune.data.collate import Batch
from qtune.data.sample import Sample
from qtune.model.head import losses_of_targets, measuring
from qtune.train.objective import Figures, Step

PAIR_FIGURES = ("rewards/chosen", "rewards/rejected", "accuracy", "margin")


@dataclass(frozen=True)
class Answers:
    """The answers of a batch, one per part of its rows."""

    log_probs: Tensor  # [P] float32, weighted sums over tokens, with gradient
    num_tokens: Tensor  # [P] float32, sums of the weights

    @property
    def mean(self) -> Tensor:
        """Log-probabilities per token, float32 [P]."""
        return self.log_probs / self.num_tokens


class PerRow:
    """What objectives have in common whose rows are pairs, independent of each other."""

    figures: tuple[str, ...] = PAIR_FIGURES

    def count(self, samples: Sequence[Sample]) -> float:
        """The number of rows."""
        return float(len(samples))

    def shared(self, model: nn.Module, step: Step) -> Tensor | None:
        """Nothing: rows are independent."""


def answers(model: nn.Module, batch: Batch) -> Answers:
    """The batch's answers under the model; the parts of each row are side by side."""
    counts = torch.bincount(batch.sample_of, minlength=sum(batch.num_parts)).tolist()
    losses = losses_of_targets(model, batch)
    weights = torch.ones_like(losses) if batch.weights is None else batch.weights
    return Answers(_sums(-losses * weights, counts), _sums(weights, counts))


def reference_answers(model: nn.Module, batch: Batch) -> Answers:
    """The batch's answers under the base model, without gradient."""
    with adapter_off(model), measuring(model):
        return answers(model, batch)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The adapters of a maybe wrapped PeftModel are switched off; parameters keep their flags.

    PEFT freezes what it switches off, and afterwards unfreezes what it finds in the model: under
    FSDP that may be a gathered copy, and the shards would stay frozen.
    """
    adapted = extract_model_from_parallel(model, keep_torch_compile=False)
    assert isinstance(adapted, PeftModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with adapted.disable_adapter():
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


def split_pairs(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected answers, [rows] each, of values [P] of all parts."""
    assert all(num_parts == 2 for num_parts in batch.num_parts), "rows without a rejected answer"
    return values[0::2], values[1::2]


def pair_figures(chosen: Tensor, rejected: Tensor) -> Figures:
    """PAIR_FIGURES of the rewards [rows] of chosen and rejected answers, summed over rows."""
    chosen, rejected = chosen.detach(), rejected.detach()
    values = chosen, rejected, (chosen > rejected).float(), chosen - rejected
    return {name: value.sum() for name, value in zip(PAIR_FIGURES, values, strict=True)}


def _sums(values: Tensor, counts: list[int]) -> Tensor:
    """Sums of consecutive values [N], `counts` of them each, float32 [P]."""
    # one more than asked for: without any, the result would not depend on the model, and a process
    # that has no rows left would leave out the backward pass that the others wait for
    return torch.stack([part.sum() for part in values.split([*counts, 0])])[:-1]
