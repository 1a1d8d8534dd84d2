"""What a model calls its blocks with: found by running it, with the blocks themselves left out.

Positions, masks and whatever else a model makes of its token ids comes to a block as arguments, not
the same ones for every block (sliding windows). So each block is replaced by one that notes what it
is given and hands the hidden states on. Only these depend on other blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model.blocks import blocks

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [1, T, H] behind the block, of those before it."""
        return _first(block(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Trace:
    """The blocks in the order in which they run, with their calls, one for each row of tokens.

    `hidden` is what the first block is given, [1, T, H] for each row.
    """

    names: list[str]
    calls: dict[str, list[Call]]
    hidden: list[Tensor]


def trace(model: PreTrainedModel, rows: Sequence[list[int]], ready: Callable[[str], Any]) -> Trace:
    """The calls of the model's blocks for rows of token ids.

    `ready(name)` makes the block of that name able to run within its context. Raises UserError for
    a model whose blocks do not run one after the other, each once.
    """
    names = {block: name for name, block in model.named_modules() if block in set(blocks(model))}
    if not names:
        raise UserError(
            f"{type(model).__name__} is not made of blocks that could be calibrated one after the "
            "other; set quant.method: nearest and lora.init: zero"
        )
    rest = _rest_of_output(model, names, rows[0], ready)
    calls: dict[str, list[Call]] = {}
    hidden = []
    for row in rows:
        given, noted = _noted(model, names, row, rest)
        _check_order(model, list(calls) or [n for n, _ in noted], [n for n, _ in noted])
        hidden.append(given)
        for name, call in noted:
            calls.setdefault(name, []).append(call)
    return Trace(list(calls), calls, hidden)


def _noted(
    model: PreTrainedModel, names: dict[nn.Module, str], row: list[int], rest: Any
) -> tuple[Tensor, list[tuple[str, Call]]]:
    """What the first block is given, and the calls of all, in their order."""
    noted: list[tuple[str, Call]] = []
    first: list[Tensor] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = _split(args, kwargs)
        first.append(hidden)
        noted.append((names[block], call))
        return hidden if rest is None else (hidden, *rest)

    with _instead_of(names, note):
        _run(model, row)
    return first[0], noted


def _rest_of_output(
    model: PreTrainedModel,
    names: dict[nn.Module, str],
    row: list[int],
    ready: Callable[[str], Any],
) -> tuple[Any, ...] | None:
    """What a block returns behind the hidden states; None where it returns nothing but these."""
    found: list[Any] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ready(names[block]):
            found.append(type(block).forward(block, *args, **kwargs))
        raise _Enough

    with _instead_of(names, stop), suppress(_Enough):
        _run(model, row)
    return found[0][1:] if isinstance(found[0], tuple) else None


class _Enough(Exception):
    """Raised in a block once there is nothing left to learn from its model."""


@contextmanager
def _instead_of(names: dict[nn.Module, str], forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `forward(block, args, kwargs)` runs in the place of each block."""
    for block in names:
        block.forward = lambda *args, _block=block, **kwargs: forward(_block, args, kwargs)
    try:
        yield
    finally:
        for block in names:
            del block.forward


def _run(model: PreTrainedModel, row: list[int]) -> None:
    embeddings = model.get_input_embeddings().get_parameter("weight")
    ids = torch.tensor([row], device=embeddings.device)
    # the head behind it would cost more than a block
    model.base_model(input_ids=ids, use_cache=False)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    others = {name: value for name, value in kwargs.items() if name != HIDDEN}
    return kwargs[HIDDEN], Call((), others)


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _check_order(model: nn.Module, expected: list[str], found: list[str]) -> None:
    """Raises UserError unless the blocks ran as they did for the first row, each once."""
    if expected != found or len(set(found)) != len(found):
        raise UserError(
            f"{type(model).__name__} does not run its blocks one after the other, each once, so it "
            "cannot be calibrated; set quant.method: nearest and lora.init: zero"
        )
