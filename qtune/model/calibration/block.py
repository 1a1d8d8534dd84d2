"""One block: its layers are fitted in the order of their use, and its hidden states handed on.

The block is the model's own. While it is worked on its quantized layers are dense ones, and become
quantized as their codes are found. `sequential` measures each layer on what the quantized layers
before it hand on, adapters' starts included, as they will be when training begins; otherwise all
are measured in one pass of the dense block, whose outputs go to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtune.model.calibration.dense import Dense
from qtune.model.calibration.fit import Figures, Fitted, Wanted, fit
from qtune.model.calibration.hessian import Enough, measuring, sharing
from qtune.model.calibration.trace import Call
from qtune.model.prequantized import on_meta
from qtune.model.quantizer import release_pages
from qtune.quant.linear import QuantLinear
from qtune.quant.method import shared_channels


@dataclass
class Outcome:
    """What is found for the layers of a block; tensors by their names in the model."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    figures: list[Figures] = field(default_factory=list)

    def add(self, name: str, fitted: Fitted) -> None:
        """Take what was found for the layer of that name."""
        self.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in fitted.tensors.items()}
        self.figures.append(fitted.figures)
        if fitted.start is not None:
            self.starts[name] = fitted.start


class Place(NamedTuple):
    """The two layers that take turns in one place of a block."""

    dense: nn.Linear
    quantized: QuantLinear


@contextmanager
def dense_block(dense: Dense, name: str) -> Iterator[dict[str, Place]]:
    """Meanwhile the block of that name can run: its layers are dense, its experts quantized.

    Behind it the quantized layers are in their places again, empty.
    """
    model = dense.model
    places = {
        found: _place(model.get_submodule(found), weight, dense.device)
        for found, weight in dense.weights.items()
        if found.startswith(f"{name}.")
    }
    with dense.experts_of(name), torch.no_grad():
        for found, place in places.items():
            model.set_submodule(found, place.dense)
        try:
            yield places
        finally:
            for found, place in places.items():
                model.set_submodule(found, place.quantized)
                for leaf in place.quantized.tensor_names:
                    setattr(place.quantized, leaf, on_meta(getattr(place.quantized, leaf)))
                release_pages(dense.weights[found])


def calibrate_block(
    dense: Dense, name: str, hidden: list[Tensor], calls: Sequence[Call], wanted: Wanted
) -> Outcome:
    """What is found for the block's layers; `hidden`, one tensor a row, goes on behind the block.

    Layers that no row comes to are quantized to the nearest level.
    """
    with dense_block(dense, name) as places, ExitStack() as adapters:
        block = dense.model.get_submodule(name)
        work = _Work(dense, places, block, hidden, calls, wanted, adapters)
        linears = {found: place.dense for found, place in places.items()}
        groups = sharing(linears, lambda: calls[0].run(block, hidden[0]))
        if wanted.quant.calibration.sequential:
            for group in groups:
                work.fit_group(group)
            work.go_on()
        else:
            work.fit_at_once(groups)
        for unused in sorted(places.keys() - {found.name for found in work.outcome.figures}):
            work.fit(unused, None)
    return work.outcome


@dataclass
class _Work:
    """A block on which rows are run while its layers become quantized."""

    whole: Dense
    places: dict[str, Place]
    block: nn.Module
    hidden: list[Tensor]
    calls: Sequence[Call]
    wanted: Wanted
    adapters: ExitStack
    outcome: Outcome = field(default_factory=Outcome)

    def fit_group(self, group: list[str]) -> None:
        """Fit layers that share their input, and let them be quantized from now on."""
        with measuring({group[0]: self.places[group[0]].dense}, stop=True) as found:
            for hidden, call in zip(self.hidden, self.calls, strict=True):
                with suppress(Enough):
                    call.run(self.block, hidden)
        self._fit_for(group, found[group[0]].mean())

    def fit_at_once(self, groups: list[list[str]]) -> None:
        """Fit all layers for what the dense block gives them, and hand its outputs on."""
        with measuring({group[0]: self.places[group[0]].dense for group in groups}) as found:
            self.go_on()
        for group in groups:
            self._fit_for(group, found.pop(group[0]).mean())

    def go_on(self) -> None:
        """Put the hidden states behind the block, as it is now, in the place of those before it."""
        for i, call in enumerate(self.calls):
            self.hidden[i] = call.run(self.block, self.hidden[i])

    def fit(self, name: str, hessian: Tensor | None, channels: Tensor | None = None) -> None:
        """Fit one layer and put it, with its adapter's start, in the place of the dense one."""
        place = self.places[name]
        found = place.quantized, self._weight(name), hessian, self.wanted, channels
        fitted = fit(name, *found)
        self.whole.model.set_submodule(name, place.quantized)
        if fitted.start is not None:
            hook = place.quantized.register_forward_hook(_adding(*fitted.start))
            self.adapters.callback(hook.remove)
        self.outcome.add(name, fitted)

    def _fit_for(self, group: list[str], hessian: Tensor | None) -> None:
        """Fit layers that share an input of that Hessian."""
        channels = None
        if self.wanted.shares and hessian is not None:
            layers = [self.places[name].quantized for name in group]
            weights = [self._weight(name) for name in group]
            channels = shared_channels(layers, weights, hessian, self.wanted.quant)
        for name in group:
            self.fit(name, hessian, channels)

    def _weight(self, name: str) -> Tensor:
        """The dense weight [O, I] of a layer, on the device where it is computed."""
        return self.whole.weights[name].to(self.places[name].dense.weight.device)


def _adding(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """A hook that adds x A^T B^T to what a layer gives."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        (x,) = args
        return y + x @ a.to(x.dtype).T @ b.to(x.dtype).T

    return hook


def _place(layer: nn.Module, weight: Tensor, device: torch.device) -> Place:
    """An empty layer, and a dense one of that weight in the dtype in which the other computes."""
    assert isinstance(layer, QuantLinear)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, layer.compute_dtype), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return Place(linear, layer)
