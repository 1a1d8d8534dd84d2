"""One layer: the codes for its dense weight, and the start of its adapter, given its inputs."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtune.model.calibration.hessian import output_error
from qtune.quant import lowrank, method
from qtune.quant.linear import QuantLinear
from qtune.recipe import Quant


@dataclass(frozen=True)
class Wanted:
    """What is to be found for every layer: how codes are chosen, how adapters begin.

    `ranks` are those of the adapters, by the names of the layers that get one; `init` None: they
    begin at zero. With `shares` layers of one input have the same channel factors.
    """

    quant: Quant
    init: lowrank.Init | None
    ranks: dict[str, int]
    shares: bool = False


@dataclass(frozen=True)
class Figures:
    """How a layer came out; errors are parts of its output, with and without its adapter."""

    name: str
    format: str
    method: str
    error: float | None
    adapted_error: float | None
    seconds: float
    notes: tuple[str, ...]
    """What was wrong with the Hessian, and what was done about it."""


@dataclass(frozen=True)
class Fitted:
    """The tensors of a layer, by its parameters' names, and A [R, I] and B [O, R] of its start."""

    tensors: dict[str, Tensor]
    start: tuple[Tensor, Tensor] | None
    figures: Figures


@torch.no_grad()
def fit(
    name: str,
    layer: QuantLinear,
    weight: Tensor,
    hessian: Tensor | None,
    wanted: Wanted,
    channels: Tensor | None = None,
) -> Fitted:
    """The best codes, which `layer` has from now on, and start for a dense weight [O, I].

    Without a Hessian codes are the nearest ones, and there is no start. `channels` [I] are factors
    shared with others.
    """
    began = time.monotonic()
    quant = wanted.quant if hessian is not None else replace(wanted.quant, method="nearest")
    notes: list[str] = []
    tensors = method.quantize(layer, weight, hessian, quant, notes.append, channels)
    layer.load(tensors)
    start = None
    if hessian is not None and wanted.init is not None and name in wanted.ranks:
        changed, a, b = lowrank.start(
            wanted.init,
            weight,
            layer,
            hessian,
            wanted.ranks[name],
            damping=quant.calibration.damping,
            encode=lambda dense: method.quantize(
                layer, dense, hessian, quant, notes.append, channels
            ),
            note=notes.append,
        )
        tensors, start = changed or tensors, (a, b)
    error, adapted = _errors(layer, weight, hessian, start)
    took = time.monotonic() - began
    found = layer.storage.format, quant.method, error, adapted, took, tuple(notes)
    return Fitted(tensors, start, Figures(name, *found))


def _errors(
    layer: QuantLinear,
    weight: Tensor,
    hessian: Tensor | None,
    start: tuple[Tensor, Tensor] | None,
) -> tuple[float | None, float | None]:
    """What part of the layer's output is lost, and what part with its adapter."""
    if hessian is None:
        return None, None
    difference = weight.float() - layer.dequantize(torch.float32)
    error = output_error(difference, weight, hessian)
    if start is None:
        return error, None
    a, b = (part.float() for part in start)
    return error, output_error(difference - b @ a, weight, hessian)
