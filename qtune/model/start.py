"""Where adapters begin, as a file beside the model that it belongs to.

The file holds A [R, I] and B [O, R] of each layer in float32 under PEFT's names. Their product is
the change of the weight itself: PEFT's scaling, which alpha sets, is divided out when they are put
into a model. With such a start the untrained adapter already makes up for what quantization took
away, so on the original weights it is no change: what training changed there is BA - B0A0, which a
merge adds, and which `difference` writes as one adapter of twice the rank.
"""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from qtune.errors import UserError

# A and B by the names of their layers in the base model
Start = Mapping[str, tuple[Tensor, Tensor]]

FILE = "adapter_start.safetensors"
PREFIX = "base_model.model."
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def write(path: Path, starts: Start) -> None:
    """Write A and B of each layer, by the layer's name in the base model."""
    tensors = {
        f"{PREFIX}{name}{suffix}": part.float().contiguous()
        for name, pair in starts.items()
        for suffix, part in zip(SUFFIXES, pair, strict=True)
    }
    save_file(tensors, path)


def read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer; nothing where there is no such file, which is a start at zero."""
    if not path.is_file():
        return {}
    tensors = load_file(path)
    keys = [key.removesuffix(SUFFIXES[0]) for key in tensors if key.endswith(SUFFIXES[0])]
    a, b = SUFFIXES
    return {key.removeprefix(PREFIX): (tensors[key + a], tensors[key + b]) for key in sorted(keys)}


def put(model: PeftModel, path: Path) -> None:
    """Let the model's adapter begin as the file says; UserError: it has other layers or ranks."""
    if model.active_peft_config.use_dora:
        raise UserError(
            "lora.dora begins with the weights' own lengths, so lora.init must be zero; leave one "
            "of them out"
        )
    (adapter,) = model.active_adapters
    layers = dict(model.get_base_model().named_modules())
    for name, pair in read(path).items():
        layer = layers.get(name)
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            raise UserError(f"{path} has a start for {name}, which has no adapter here; see lora")
        _put(layer, adapter, pair, f"{path}: {name}")


def difference(
    model: PeftModel, tensors: Mapping[str, Tensor], starts: Start
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter that does to the original weights what training has done, of twice the rank.

    `tensors` are the trained ones by PEFT's names. What comes back are [A; A0] and [B, -B0] in
    their place, and the fields of PEFT's configuration that differ; scalings stay as they are.
    """
    layers, config = dict(model.get_base_model().named_modules()), model.active_peft_config
    (adapter,) = model.active_adapters
    made = dict(tensors)
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        a, b = starts.get(name, (None, None))
        if part == "A.weight":
            made[key] = _stacked(tensor, a)
        elif part == "B.weight":
            begun = None if b is None else (b / -layers[name].scaling[adapter]).T
            made[key] = _stacked(tensor.T, begun).T.contiguous()
    # alpha / rank stays, or alpha / sqrt(rank)
    growth = sqrt(2) if config.use_rslora else 2
    return made, {
        "r": 2 * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: growth * alpha for name, alpha in config.alpha_pattern.items()},
    }


def _stacked(trained: Tensor, begun: Tensor | None) -> Tensor:
    """[2 R, N] of trained rows [R, N], with those of the start below, or zeros in their place."""
    if begun is None:
        begun = trained[:0]
    missing = len(trained) - len(begun)
    return torch.cat([trained, pad(begun.to(trained), (0, 0, 0, missing))])


def _put(layer: LoraLayer, adapter: str, pair: tuple[Tensor, Tensor], where: str) -> None:
    a, b = pair
    own_a, own_b = (part[adapter].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    if len(a) > len(own_a):
        raise UserError(f"{where} has rank {len(a)} and not {len(own_a)}; set lora.rank back")
    with torch.no_grad():
        # ranks beyond those of the matrix begin as always: A at random, and B at zero
        own_a[: len(a)] = a
        own_b.zero_()[:, : len(a)] = b / layer.scaling[adapter]
