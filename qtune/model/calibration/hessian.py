"""What linear layers are given: the mean of x^T x over all tokens, and which layers share it.

Layers share an input where they are given the very same tensor, which is found out by running them
and not by their names: queries, keys and values of one block, gate and up.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Hessian:
    """Mean of x^T x over tokens x [T, I], float32 [I, I]: second derivative of an output error."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of x [..., I]."""
        tokens = x.detach().flatten(0, -2).float()
        if self._sum is None:
            self._sum = tokens.new_zeros(tokens.shape[-1], tokens.shape[-1])
        self._sum.addmm_(tokens.T, tokens)
        self.num_tokens += len(tokens)

    def mean(self) -> Tensor | None:
        """The mean, float32 [I, I]; None where no token came."""
        return self._sum / self.num_tokens if self._sum is not None and self.num_tokens else None


class Enough(Exception):
    """Raised inside a block that need not run to its end."""


def sharing(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Names of layers that `run()` gives the same tensor, in the order in which they are used.

    Layers that do not run are in none of them; one that runs several times is alone.
    """
    groups: dict[Any, list[str]] = {}
    # what stays alive keeps its address
    kept: list[Tensor] = []
    calls: list[str] = []

    def note(name: str, x: Tensor) -> None:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        kept.append(x)
        calls.append(name)
        groups.setdefault(key, []).append(name)

    with _given(layers, note):
        run()
    several = {name for name in calls if calls.count(name) > 1}
    once = [[name for name in group if name not in several] for group in groups.values()]
    alone = [[name] for name in dict.fromkeys(calls) if name in several]
    return [group for group in [*once, *alone] if group]


@contextmanager
def measuring(
    layers: Mapping[str, nn.Module], *, stop: bool = False
) -> Iterator[dict[str, Hessian]]:
    """The Hessians of these layers, from all that they are given meanwhile.

    With `stop` Enough is raised in a layer once it was given something.
    """
    found = {name: Hessian() for name in layers}

    def add(name: str, x: Tensor) -> None:
        found[name].add(x)
        if stop:
            raise Enough

    with _given(layers, add):
        yield found


@contextmanager
def _given(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile `take(name, x)` sees what each layer is given."""

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args: take(name, args[0])

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T): what part of a layer's output a change D [O, I] of W loses."""
    lost, whole = (torch.sum(m @ hessian * m) for m in (difference, weight.float()))
    return float(lost / whole) if whole else 0.0
