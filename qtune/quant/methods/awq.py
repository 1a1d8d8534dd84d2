"""AWQ: inputs that carry much are scaled down, and their weights up, before the nearest level.

arXiv 2306.00978. A weight that is larger within its group loses less of itself. How far to go is
searched for: the factor of an input is a power of its root mean square, and the power is the one
with the least error of the layer's outputs, tr(E H E^T). Each group's range is searched for with
every power: in 3 bits and below what suits whole ranges does not suit smaller ones. The factors
stay in the layer, so layers that share an input need not agree on them. Where they are to be folded
into the layer before, they have to: then one power is chosen for all of them (`shared`), and layers
behind nothing that could take factors have none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtune.quant.grouped import decoded, encoded, fit_groups
from qtune.quant.hessian import Note, damped
from qtune.quant.linear import QuantLinear
from qtune.recipe_quant import Quant

# powers that are tried: 0, which changes nothing, to almost 1
POWERS = tuple(k / 20 for k in range(20))
# rows of a weight that are tried: enough for one number
ROWS = 64
# the factors are stored in float16
SMALLEST, LARGEST = 1e-4, 1e4


def awq(
    layer: QuantLinear,
    weight: Tensor,
    hessian: Tensor | None,
    settings: Quant,
    note: Note,
    channels: Tensor | None = None,
) -> dict[str, Tensor]:
    """What `layer.load` takes for a dense weight [O, I], given its Hessian [I, I].

    Factors are searched for where the layer's storage has such and none, `channels` [I], are given.
    """
    if hessian is None:
        raise ValueError("AWQ needs a Hessian")
    weight = weight.float()
    regular = damped(hessian, settings.calibration.damping, note)[0].float()
    if channels is None and layer.storage.channels:
        channels = best_channels(layer, weight, regular)
    inner = layer.inner_weight(weight, channels)
    importance = layer.inner_hessian(regular, channels).diagonal()
    settled = layer.settle(fit_groups(layer.format, inner, layer.group_size, importance))
    codes = encoded(layer.format, inner, settled.params, layer.group_size)
    return layer.store(codes, settled, channels)


def shared(
    layers: Sequence[QuantLinear], weights: Sequence[Tensor], hessian: Tensor, settings: Quant
) -> Tensor | None:
    """The factors [I] that are best for all layers of one input together; None: they have none."""
    if not all(layer.storage.channels for layer in layers):
        return None
    notes: list[str] = []  # each layer says the same of the Hessian by itself
    regular = damped(hessian, settings.calibration.damping, notes.append)[0].float()
    return best_channels(layers[0], torch.cat([weight.float() for weight in weights]), regular)


METHOD = awq
SHARED = shared


def best_channels(layer: QuantLinear, weight: Tensor, hessian: Tensor) -> Tensor:
    """What inputs are multiplied by, float32 [I], for the least error of the outputs."""
    some = weight[:: -(-len(weight) // ROWS)]
    magnitudes = hessian.diagonal().sqrt()
    tried = [_channels(magnitudes, power) for power in POWERS]
    errors = [_output_error(layer, some, hessian, channels) for channels in tried]
    return tried[int(torch.stack(errors).argmin())]


def _channels(magnitudes: Tensor, power: float) -> Tensor:
    """One over a power of magnitudes [I], around 1."""
    raised = magnitudes**power
    return ((raised.amax() * raised.amin()).sqrt() / raised).clamp(SMALLEST, LARGEST)


def _output_error(layer: QuantLinear, weight: Tensor, hessian: Tensor, channels: Tensor) -> Tensor:
    """tr(E H E^T) of the nearest levels, with scales as they are before they are stored."""
    inner, hessian = layer.inner_weight(weight, channels), layer.inner_hessian(hessian, channels)
    size = min(layer.group_size, inner.numel())
    params = fit_groups(layer.format, inner, size, hessian.diagonal())
    codes = encoded(layer.format, inner, params, size)
    change = decoded(layer.format, codes, params, size) - inner
    return ((change @ hessian) * change).sum()
