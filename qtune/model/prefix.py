"""A model's blocks run one at a time, and what comes before them only once.

To try many changes of one block, all blocks before it would compute the same over and over. What
the last of them hands on is kept instead, and given out by every block that is left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from qtune.model.calibration.hessian import Enough

Output = Any


@contextmanager
def left_out(blocks: Sequence[nn.Module], output: Output) -> Iterator[None]:
    """Meanwhile each of these blocks returns `output` without computing anything."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward


@contextmanager
def stopping_behind(block: nn.Module) -> Iterator[list[Output]]:
    """What the block returns meanwhile, call by call; each raises Enough instead of going on."""
    found: list[Output] = []

    def stop(module: nn.Module, args: Any, output: Output) -> None:
        found.append(output)
        raise Enough

    handle = block.register_forward_hook(stop)
    try:
        yield found
    finally:
        handle.remove()
