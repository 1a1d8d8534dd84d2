"""What would be left of an adapter if the merged weights were quantized again, layer by layer.

Weights that came from a grid lie on it, and a small update moves hardly any of them to the next
level: most of the adapter is rounded away. So whoever merges into quantized weights is told the
share that survives, <Q(W + D) - W, D> / |D|^2 with W the dequantized weights, D the adapter's
change and Q quantizing again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from qtune.model.checkpoint import Names, stored_names, stored_tensor
from qtune.model.merge import Update, adapter_updates, base_model, quant_layers
from qtune.quant.linear import QuantLinear

MAX_WEIGHTS = 200_000_000


@dataclass(frozen=True)
class Survival:
    """Squared norms of a layer's weights, of the adapter's change and of the quantization error.

    `kept` is the projection of what a second quantization leaves of the change onto the change.
    """

    name: str
    weight: float
    change: float
    error: float
    kept: float

    @property
    def change_ratio(self) -> float:
        """|D| / |W|: the size of the adapter's change."""
        return float((self.change / self.weight) ** 0.5)

    @property
    def error_ratio(self) -> float:
        """|W - dequantized W| / |W|: the size of the quantization error."""
        return float((self.error / self.weight) ** 0.5)

    @property
    def share(self) -> float:
        """The share of the change that survives: about 1 if none is lost, 0 if all is."""
        return self.kept / self.change


def merge_report(
    base_folder: Path, model: PeftModel, *, max_weights: int = MAX_WEIGHTS
) -> list[Survival]:
    """The figures of every quantized layer that the adapter changes; `original` weights must be in
    the folder.

    Of a model with more than `max_weights` such weights, evenly spaced layers are taken. Experts,
    which the folder has in one tensor for all, are left out.
    """
    layers, names = quant_layers(model), Names.of(base_model(model))
    places = {
        names.in_model(name): (path, name) for name, path in stored_names(base_folder).items()
    }
    updates = {
        name: update
        for name, update in adapter_updates(model).items()
        if name in layers and name in places
    }
    total = sum(layers[name].in_features * layers[name].out_features for name in updates)
    chosen = sorted(updates)[:: -(-total // max_weights) or 1]
    found = (
        _survival(name, layers[name], updates[name], stored_tensor(*places[name]))
        for name in chosen
    )
    return [figures for figures in found if figures.change > 0]


def pooled(report: list[Survival]) -> Survival | None:
    """The figures of all layers together, or None of an empty report."""
    if not report:
        return None
    sums = (
        sum(getattr(one, key) for one in report) for key in ("weight", "change", "error", "kept")
    )
    return Survival("all", *sums)


def explain(report: list[Survival]) -> Iterator[str]:
    """Lines that tell a user what quantizing the merged weights again would do."""
    total = pooled(report)
    if total is None:
        return
    yield (
        f"The adapter changes the weights by {total.change_ratio:.2%}, quantizing had by "
        f"{total.error_ratio:.2%}. Quantized again on the same grid, {total.share:.1%} of the "
        "adapter survives."
    )
    worst = min(report, key=lambda one: one.share)
    yield f"Least survives in {worst.name}: {worst.share:.1%}."


@torch.no_grad()
def _survival(name: str, layer: QuantLinear, update: Update, original: Tensor) -> Survival:
    base = layer.dequantize(torch.float32)
    merged = update(base)
    change = merged - base
    original = original.to(base.device, torch.float32)
    moved = _requantized(layer, merged) - base
    return Survival(
        name,
        weight=_dot(original, original),
        change=_dot(change, change),
        error=_dot(original - base, original - base),
        kept=_dot(moved, change),
    )


def _requantized(layer: QuantLinear, weight: Tensor) -> Tensor:
    """What the weight [O, I] becomes on the layer's own grid, float32."""
    twin = type(layer)(layer.in_features, layer.out_features, storage=layer.storage, device="meta")
    twin.load(layer.pack(weight, layer.channel_factors))
    return twin.dequantize(torch.float32)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))
