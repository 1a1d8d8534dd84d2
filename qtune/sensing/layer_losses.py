"""What a model loses on a text when one of its layers has other weights, and what layers are given.

Goes through the blocks in order. Memory holds the model, the hidden states of the text at one block
and the Hessians of that block's layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.data.collate import Batch, collate
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.evaluate.mode import measuring as evaluating
from qtune.evaluate.paired import Difference, difference
from qtune.evaluate.perplexity import SampleLoss
from qtune.model.blocks import blocks
from qtune.model.calibration.hessian import measuring
from qtune.model.experts import is_experts
from qtune.model.head import losses_of_targets
from qtune.model.prefix import Output, left_out, outputs_of


@dataclass
class Block:
    """A block that runs on what the 16-bit blocks before it hand on."""

    layers: dict[str, nn.Linear]
    """Its linear layers by their names in the model."""
    _losses: "LayerLosses"
    _number: int

    def hessians(self) -> dict[str, Tensor]:
        """Of each layer the mean of x^T x over the text, float32 [I, I]."""
        with measuring(self.layers) as found:
            self._losses.run(self._number)
        means = {name: hessian.mean() for name, hessian in found.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def loss_change(self, name: str, weight: Tensor) -> Difference:
        """By how much the loss changes where that layer has the weight [O, I] instead."""
        layer = self.layers[name]
        own = layer.weight.data
        layer.weight.data = weight.to(own.dtype)
        try:
            return difference(self._losses.run(self._number), self._losses.dense)
        finally:
            layer.weight.data = own


class LayerLosses:
    """The loss of a 16-bit model on rows of token ids, block by block."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[list[int]]) -> None:
        if any(is_experts(module) for module in model.modules()):
            raise UserError("sense measures linear layers, and this model is a mixture of experts")
        self._model, self._blocks = model, list(blocks(model))
        if not self._blocks:
            raise UserError(f"sense goes block by block; {type(model).__name__} has no blocks")
        self._names = {module: name for name, module in model.named_modules()}
        samples = [Sample("", row, [0.0] + [1.0] * (len(row) - 1)) for row in rows]
        self._rows = [collate([sample], model.device) for sample in samples]
        # what comes out of the block before the one that is looked at, of each row
        self._before: list[Output] = [None] * len(rows)
        self.dense: list[SampleLoss] = self.run(0)

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self._blocks)

    @property
    def loss(self) -> float:
        """Of the 16-bit model, in nats a token."""
        return sum(row.loss for row in self.dense) / sum(row.weight for row in self.dense)

    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order; each is to be done with before the next is asked for."""
        for number, block in enumerate(self._blocks):
            layers = {
                self._names[module]: module
                for module in block.modules()
                if isinstance(module, nn.Linear)
            }
            yield Block(layers, self, number)
            self._advance(number)

    def run(self, first: int) -> list[SampleLoss]:
        """The loss of each row, computed from that block on."""
        return [self._row(batch, first, at) for at, batch in enumerate(self._rows)]

    def _row(self, batch: Batch, first: int, at: int) -> SampleLoss:
        with evaluating(self._model), left_out(self._blocks[:first], self._before[at]):
            losses = losses_of_targets(self._model, batch)
        return SampleLoss(float(losses.double().sum()), float(len(losses)))

    def _advance(self, number: int) -> None:
        """Keep what the block hands on, in place of what it was given."""
        handed_on = []
        for at, batch in enumerate(self._rows):
            with outputs_of(self._blocks[number]) as found:
                self._row(batch, number, at)
            handed_on += found
        self._before = handed_on
