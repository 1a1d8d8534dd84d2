"""What linear layers are given on a text, and how the predictions depend on what they give.

The targets of all tokens are drawn from the model's own distributions, so the gradients are those
that the Fisher information is made of; with the text's own tokens they would be something else
(arXiv 1503.05671, section 5). A gradient is a first derivative, no difference of two losses, so the
16 bits in which a model computes are enough for it.

Goes through the blocks in order. Hessians are those of the whole text, for which each block runs
once. Gradients take a pass forward and back through all blocks behind it, so they are those of the
first rows only. Memory holds the model, the hidden states of the text at one block, and what the
layers of that block are given in the first rows, with the gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.data.collate import collate
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.evaluate.mode import measuring
from qtune.evaluate.perplexity import ROWS
from qtune.model.blocks import blocks
from qtune.model.calibration import hessian
from qtune.model.calibration.hessian import Enough
from qtune.model.experts import is_experts
from qtune.model.forward import forward_logits
from qtune.model.head import losses_of_targets, output_head
from qtune.model.prefix import Output, left_out, stopping_behind
from qtune_kernels.cross_entropy import token_losses

# enough to tell layers apart: from one row of 256 to the next a layer's figure varies by 40 %
GRADIENT_TOKENS = 2048


class Seen(NamedTuple):
    """One call of a layer, for one row of the text."""

    row: int
    given: Tensor  # x [T, I]
    gradient: Tensor  # [T, O], of the sum of the row's losses by what the layer gave


@dataclass(frozen=True)
class Block:
    """A block that runs on what the blocks before it hand on."""

    layers: dict[str, nn.Linear]
    """Its linear layers by their names in the model."""
    _model: "LayerGradients"
    _number: int

    def hessians(self) -> dict[str, Tensor]:
        """Of each layer that runs the mean of x^T x over the whole text, float32 [I, I]."""
        with hessian.measuring(self.layers) as found:
            self._model.go_through(self._number)
        means = {name: it.mean() for name, it in found.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def seen(self) -> dict[str, list[Seen]]:
        """What each layer that runs is given in the first rows, and its gradients."""
        return self._model.observe(self._number, self.layers)


class LayerGradients:
    """Layers of a frozen model on rows of token ids, block by block.

    Raises UserError for a mixture of experts, for a model without blocks, and without text.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[list[int]]) -> None:
        if any(is_experts(module) for module in model.modules()):
            raise UserError("sense measures linear layers, and this model is a mixture of experts")
        self._model, self._blocks = model, list(blocks(model))
        if not self._blocks:
            raise UserError(f"sense goes block by block; {type(model).__name__} has no blocks")
        # is checked with a few tokens on its first use, for which no block may be left out
        output_head(model)
        self._names = {module: name for name, module in model.named_modules()}
        # the first token of a row is predicted by nothing
        rows = [row for row in rows if len(row) > 1]
        if not rows:
            raise UserError("the text has no two tokens in a row; name another with --text")
        samples = [Sample("", row, [0.0] + [1.0] * (len(row) - 1)) for row in rows]
        self._rows = [collate([sample], model.device) for sample in samples]
        before = accumulate((len(row) for row in rows), initial=0)
        self._num_first = sum(tokens < GRADIENT_TOKENS for tokens in list(before)[:-1])
        self.loss = self._draw_targets()
        # what comes out of the block before the one that is looked at, of each row
        self._before: list[Output] = [None] * len(rows)

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self._blocks)

    @property
    def targets(self) -> list[Tensor]:
        """The drawn tokens [N] of each of the rows that gradients are taken of."""
        return [batch.targets for batch in self._rows[: self._num_first]]

    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order; each is to be done with before the next is asked for."""
        for number, block in enumerate(self._blocks):
            layers = {
                self._names[module]: module
                for module in block.modules()
                if isinstance(module, nn.Linear)
            }
            yield Block(layers, self, number)
            self._before = self.go_through(number)

    def go_through(self, number: int) -> list[Output]:
        """What the block hands on, of each row; blocks behind it do not run."""
        handed_on = []
        with torch.no_grad(), stopping_behind(self._blocks[number]) as found:
            for row in range(len(self._rows)):
                with suppress(Enough):
                    self._losses(number, row)
                handed_on.append(found.pop())
        return handed_on

    def observe(self, number: int, layers: Mapping[str, nn.Module]) -> dict[str, list[Seen]]:
        """What these layers of a block are given in the first rows, and the gradients."""
        seen: dict[str, list[Seen]] = {}
        for row in range(self._num_first):
            with _tapped(layers) as calls, torch.enable_grad():
                loss = self._losses(number, row).sum()
            gradients = torch.autograd.grad(loss, [call.tap for call in calls])
            for call, gradient in zip(calls, gradients, strict=True):
                flat = call.given.flatten(0, -2), gradient.flatten(0, -2)
                seen.setdefault(call.name, []).append(Seen(row, *flat))
        return seen

    def _draw_targets(self) -> float:
        """Put drawn tokens in the place of the text's; the mean loss of the text's own is given."""
        draw = torch.Generator(self._model.device).manual_seed(0)
        total = 0.0
        for row, batch in enumerate(self._rows[: self._num_first]):
            with measuring(self._model):
                logits = forward_logits(self._model, batch)
            total += float(token_losses(logits, batch.targets).double().sum())
            self._rows[row] = replace(batch, targets=drawn(logits, draw))
        return total / sum(map(len, self.targets))

    def _losses(self, first: int, row: int) -> Tensor:
        """-log p of the row's targets [N], computed from that block on."""
        grad = torch.is_grad_enabled()
        skipped = left_out(self._blocks[:first], self._before[row])
        with measuring(self._model), skipped, torch.set_grad_enabled(grad):
            return losses_of_targets(self._model, self._rows[row])


class _Call(NamedTuple):
    name: str
    given: Tensor
    tap: Tensor
    """Zeros that were added to the output: the gradient by them is the one by the output."""


@contextmanager
def _tapped(layers: Mapping[str, nn.Module]) -> Iterator[list[_Call]]:
    """Meanwhile the calls of these layers are noted, in their order."""
    calls: list[_Call] = []

    def hook(name: str) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(
                _Call(name, args[0].detach(), torch.zeros_like(output, requires_grad=True))
            )
            return output + calls[-1].tap

        return add

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        yield calls


def drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Tokens [N] drawn from the distributions of logits [N, V]."""
    pieces = (piece.float().softmax(-1) for piece in logits.split(ROWS))
    return torch.cat([torch.multinomial(it, 1, generator=draw) for it in pieces]).squeeze(1)
