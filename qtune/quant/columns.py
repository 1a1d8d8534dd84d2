"""Codes chosen one column after the other, so that the layer's outputs change least.

A column is what belongs to one input, in all rows of the weight. Columns are kept as the rows of a
matrix [I, O], in the order in which they are rounded. They are worked on in blocks: within a block
each sees the errors of those before it, those behind the block see all of them at once, by one
matrix product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtune.quant.format import Format, Params
from qtune.quant.grouped import changed

# columns whose errors reach those behind them in one product
BLOCK = 64
# the parameters [B, O] of some columns, given their weights [B, O] as errors have changed them
ParamsOf = Callable[[slice, Tensor], Params]


@dataclass(frozen=True)
class Columns:
    """The columns of a weight, float32 [I, O], and what their errors do to the layer's outputs."""

    fmt: Format
    weights: Tensor
    hessian: Tensor
    """Positive definite, float32 [I, I]."""
    feedback: Tensor
    """How an error spreads: U upper triangular with U^T U the inverse Hessian, float32 [I, I]."""

    def rounded(self, params_of: ParamsOf, block_size: int = BLOCK) -> Tensor:
        """Codes, uint8 [I, O], with each column's error made up for by those behind it."""
        rest, codes = self.weights.clone(), torch.empty_like(self.weights, dtype=torch.uint8)
        for block in blocks(len(rest), block_size):
            params, feedback = params_of(block, rest[block]), self.feedback[block]
            codes[block], errors = self._round(rest[block], params, feedback[:, block])
            rest[block.stop :] -= feedback[:, block.stop :].T @ errors
        return codes

    def round_anew(self, codes: Tensor, params_of: ParamsOf) -> None:
        """Give each column, in place, the codes [I, O] that are best given those of all others.

        The layer's error never grows by it.
        """
        off = torch.empty_like(self.weights)
        for block in blocks(len(codes), BLOCK):
            now = self._decode(codes[block], params_of(block, self.weights[block]))
            off[block] = self.weights[block] - now
        for block in blocks(len(codes), BLOCK):
            params = params_of(block, self.weights[block])
            codes[block], off[block] = self._descend(block, off, params)

    def _round(self, block: Tensor, params: Params, feedback: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scaled errors [B, O] of columns that know of all errors before the block."""
        codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
        for i, column in enumerate(block):
            target = column - feedback[:i, i] @ errors[:i]
            codes[i], found = self._nearest(target, params, i)
            errors[i] = (target - found) / feedback[i, i]
        return codes, errors

    def _descend(self, block: slice, off: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """New codes of a block, and how far it is from its weights; `off` [I, O] is as yet."""
        hessian, here = self.hessian[block], off[block].clone()
        pull, changes = hessian @ off, torch.empty_like(here)
        codes = torch.empty_like(here, dtype=torch.uint8)
        for i, weights in enumerate(self.weights[block]):
            now = weights - here[i]
            force = pull[i] - hessian[i, block.start : block.start + i] @ changes[:i]
            codes[i], found = self._nearest(now + force / hessian[i, block.start + i], params, i)
            changes[i] = found - now
            here[i] -= changes[i]
        return codes, here

    def _nearest(self, target: Tensor, params: Params, i: int) -> tuple[Tensor, Tensor]:
        """The codes [O] next to a column, and what they stand for."""
        own = changed(params, lambda part: part[i])
        codes = self.fmt.encode(target.unsqueeze(-1), own)
        return codes.squeeze(-1), self.fmt.decode(codes, own).squeeze(-1)

    def _decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.fmt.decode(codes.unsqueeze(-1), params).squeeze(-1)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, one behind the other, that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
