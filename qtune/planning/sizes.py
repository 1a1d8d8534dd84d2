"""Bytes and bits of a model's weights in any format, from its configuration alone.

Two numbers of bits are told apart: those of the quantized layers, scales and zero points included,
and those of the whole model. Embeddings stay as they are, so in small models they differ by much.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import PreTrainedModel

from qtune.model.skeleton import meta_model
from qtune.quant.linear import QuantLinear
from qtune.recipe import Data, Quant, Recipe, Train

# what layers take that stay as they are
BYTES_OF_DENSE = 2


@dataclass(frozen=True)
class Sizes:
    """Weights of a model in some form."""

    layers: dict[str, tuple[int, int]]
    """Weights and bytes of each layer that a format changes, without its bias."""
    other_bytes: int
    num_parameters: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of those layers."""
        return sum(size for _, size in self.layers.values())

    @property
    def layer_weights(self) -> int:
        """Weights of those layers."""
        return sum(num for num, _ in self.layers.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return self.layer_bytes + self.other_bytes

    @property
    def bits(self) -> float:
        """Bits of a weight in those layers."""
        return 8 * self.layer_bytes / self.layer_weights

    @property
    def model_bits(self) -> float:
        """Bits of a weight in the whole model."""
        return 8 * self.total_bytes / self.num_parameters


def sizes(config: Any, quant: Quant) -> Sizes:
    """The sizes of the model with that configuration; UserError where `quant` does not suit it."""
    model = base_on_meta(config, quant if quant.format is not None else Quant())
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    weights = {name: layer.in_features * layer.out_features for name, layer in found.items()}
    packed = {name: _packed(layer) for name, layer in found.items()}
    inside = {id(p) for tensors in packed.values() for p in tensors}
    others = [p for p in model.parameters() if id(p) not in inside]
    stored = {name: sum(p.nbytes for p in tensors) for name, tensors in packed.items()}
    if quant.format is None:
        stored = {name: BYTES_OF_DENSE * num for name, num in weights.items()}
    return Sizes(
        layers={name: (num, stored[name]) for name, num in weights.items()},
        other_bytes=sum(p.nbytes for p in others),
        num_parameters=sum(weights.values()) + sum(p.numel() for p in others),
    )


def base_on_meta(config: Any, quant: Quant) -> PreTrainedModel:
    """The frozen model without weights, its layers as `quant` stores them."""
    recipe = Recipe(
        model="", data=Data(train=""), quant=quant, train=Train(steps=1), run=Path("unused")
    )
    return meta_model(config, recipe)


def _packed(layer: QuantLinear) -> list[Parameter]:
    """Codes, scales and what else is in the place of the weight."""
    return [p for name, p in layer.named_parameters() if name != "bias"]
