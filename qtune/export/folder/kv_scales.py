"""Scales for keys and values in fp8, measured on text, as vLLM takes them from a checkpoint.

A served model that keeps keys and values in 8-bit floats divides them by one number per layer.
Without a measured one vLLM takes 1, and all that is beyond 448 is cut. Keys are looked at as they
enter the cache, that is after their positions are rotated into them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qtune.errors import UserError
from qtune.export.folder.trained import Trained

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
# what config.json says of them, in the words of compressed-tensors
SCHEME = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
}  # fmt: skip


class LargestSeen(DynamicCache):
    """A cache that keeps nothing but the largest magnitude of each layer's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, tuple[float, float]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values [B, H, T, D] as they came."""
        new = float(key_states.abs().max()), float(value_states.abs().max())
        old = self.largest.get(layer_idx, (0.0, 0.0))
        self.largest[layer_idx] = max(old[0], new[0]), max(old[1], new[1])
        return key_states, value_states


@torch.no_grad()
def kv_scales(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, float32 [1], of the scales of all layers, largest magnitudes over 448.

    Nothing unless the recipe asks for them. Raises UserError where there is no text, and for a
    model whose attention keeps no such cache.
    """
    if not trained.recipe.merge.kv_scales:
        return
    if trained.text is None:
        raise UserError("merge.kv_scales measures keys and values on text, and there is none here")
    cache = LargestSeen()
    for row in trained.text().rows:
        ids = torch.tensor([row], device=trained.base.device)
        trained.model(input_ids=ids, past_key_values=cache, use_cache=True)
    names = _attention_names(trained)
    if names.keys() != cache.largest.keys():
        raise UserError(
            f"merge.kv_scales: {type(trained.base).__name__} keeps keys and values in another way; "
            "leave it out"
        )
    for layer, found in sorted(cache.largest.items()):
        for word, largest in zip("kv", found, strict=True):
            yield f"{names[layer]}.{word}_scale", torch.tensor([largest / LARGEST_FP8])


def _attention_names(trained: Trained) -> dict[int, str]:
    """The name of each layer's attention, by the layer's number in the cache."""
    return {
        module.layer_idx: name
        for name, module in trained.base.named_modules()
        if type(module).__name__.endswith("Attention") and isinstance(module.layer_idx, int)
    }
