"""The experts of a mixture as its checkpoint holds them, with the adapter folded in or as codes.

In memory each expert is a layer of its own; most checkpoints have other tensors, one for each
expert and projection, and some have one for all. What is written goes under the names of the
checkpoint, so every library that reads the base reads the merged model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtune.model.checkpoint import stored_names, stored_tensor
from qtune.model.experts import expert_layers, stored_tensors
from qtune.quant.linear import QuantLinear

Update = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FusedMatrix:
    """One matrix of a layer's experts: its layers, and what stands for it in the checkpoint."""

    name: str
    transposed: bool
    layers: dict[str, QuantLinear]
    stored: frozenset[str]

    @property
    def weights(self) -> list[str]:
        """The names of the experts' weights in the model."""
        return [f"{name}.weight" for name in self.layers]


def fused_matrices(model: PreTrainedModel, folder: Path) -> list[FusedMatrix]:
    """The matrices of experts that `folder` holds under other names than the model."""
    names = stored_names(folder)
    found = []
    for name, transposed, wrapped in expert_layers(model):
        # PEFT's layers hold the quantized ones
        layers = {n: cast(QuantLinear, getattr(m, "base_layer", m)) for n, m in wrapped.items()}
        if all(f"{each}.weight" in names for each in layers):
            # a folder that qtune has written holds codes under the model's names
            continue
        first = next(iter(layers.values()))
        empty = torch.empty(len(layers), first.out_features, first.in_features, device="meta")
        stored = frozenset(stored_tensors(model, name, empty, transposed=transposed))
        whole = stored if stored <= names.keys() else frozenset({name})
        found.append(FusedMatrix(name, transposed, layers, whole))
    return found


def merged_experts(
    model: PreTrainedModel,
    folder: Path,
    matrix: FusedMatrix,
    updates: dict[str, Update],
    *,
    onto_codes: bool,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor, bool]]:
    """Stored name, merged tensor on the CPU, and whether the adapter changed it.

    Added to what the codes stand for, or else to the tensors in `folder`; one matrix of a layer's
    experts is in memory at a time, in float32.
    """
    touched = any(name in updates for name in matrix.weights)
    files = stored_names(folder)
    before = _as_stored(model, matrix, _dense(matrix)) if onto_codes else {}
    delta = _as_stored(model, matrix, _delta(matrix, updates)) if touched else {}
    for name in sorted(matrix.stored):
        original = stored_tensor(files[name], name)
        base = before.get(name, original)
        wanted = dtype if dtype and original.dtype == torch.float32 else original.dtype
        after = base.float() + delta[name] if touched else base
        rounded = after.to("cpu", wanted)
        yield name, rounded, touched and not torch.equal(rounded, base.to("cpu", wanted))


def _as_stored(model: PreTrainedModel, matrix: FusedMatrix, fused: Tensor) -> dict[str, Tensor]:
    if matrix.stored == {matrix.name}:
        return {matrix.name: fused.transpose(1, 2) if matrix.transposed else fused}
    return stored_tensors(model, matrix.name, fused, transposed=matrix.transposed)


def _dense(matrix: FusedMatrix) -> Tensor:
    """What the codes stand for, float32 [E, O, I]."""
    return torch.stack([layer.dequantize(torch.float32) for layer in matrix.layers.values()])


def _delta(matrix: FusedMatrix, updates: dict[str, Update]) -> Tensor:
    """What the adapters add, float32 [E, O, I]."""
    with torch.no_grad():
        return torch.stack(
            [_layer_delta(name, layer, updates) for name, layer in matrix.layers.items()]
        )


def _layer_delta(name: str, layer: QuantLinear, updates: dict[str, Update]) -> Tensor:
    nothing = torch.zeros(layer.out_features, layer.in_features)
    update = updates.get(f"{name}.weight")
    return nothing if update is None else update(nothing).cpu()
