"""The tensors of a quantized export in either form, for exporters that say how one layer is
written.

`pair`: the frozen base with the very codes that were trained on, and scales if these were trained;
the adapter, if there is one, goes beside it.
`merged`: the adapter merged into the original weights, which are then quantized once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qtune.export.adapter import base_name, has_tensors, write_adapter
from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import Names, bare_name, distinct_tensors
from qtune.model.merge import codes_beside_weights, merged_tensors, quant_layers, untied
from qtune.model.merge_experts import fused_matrices
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import quantized_on_meta
from qtune.model.shards import write_shards
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

# the tensors of a layer, by full name, given its name with the dot
Encode = Callable[[str, QuantLinear], Iterator[tuple[str, Tensor]]]
# how a layer of that name, as in the model, is quantized
StorageOf = Callable[[str], Storage]


def write_quantized(trained: Trained, folder: Path, encode: Encode, storage_of: StorageOf) -> None:
    """Write the weights, and in the pair form the adapter, of `trained` into `folder`.

    Layers of the merged form are quantized as `storage_of` their names says.
    """
    if trained.form == "pair":
        write_shards(_pair(trained, encode), folder)
        if has_tensors(trained.model):
            (folder / "adapter").mkdir()
            write_adapter(
                trained.model, folder / "adapter", base_name(trained), trained.recipe.revision
            )
    else:
        write_shards(_merged(trained, encode, storage_of), folder)


def quantized_bytes(trained: Trained) -> int:
    """An upper bound of what either form takes: everything the model holds in memory."""
    parameters = trained.model.parameters()
    return sum(p.nbytes for p in parameters)


def dense_linears(trained: Trained) -> list[str]:
    """Names of the linear layers that stay in 16 bits."""
    linears = {
        bare_name(f"{name}.weight")
        for name, layer in trained.base.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
        and ".lora_" not in name
        and ".modules_to_save" not in name
    }
    return sorted(name.removesuffix(".weight") for name in linears - quantized_weights(trained))


def quantized_weights(trained: Trained) -> set[str]:
    """Names, in the model, of weights to quantize: those that were, or would be by the recipe."""
    present = quant_layers(trained.model)
    if present:
        return set(present)
    quant = trained.recipe.quant
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(trained.base.config)
    quantized_on_meta(model, QtuneConfig("nf4", quant.group_size, list(quant.skip)))
    layers = model.named_modules()
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, QuantLinear)}


def config_changes(trained: Trained) -> dict[str, object]:
    """What both quantized exports change in config.json beside their own entry."""
    changes: dict[str, object] = {"dtype": str(trained.dtype).removeprefix("torch.")}
    splits = trained.form == "merged" and untied(trained.model)
    return changes | ({"tie_word_embeddings": False} if splits else {})


def form_of(trained: Trained) -> dict[str, object]:
    """What qtune.json says of the form of a quantized export."""
    return {"form": "pair"} if trained.form == "pair" else {"form": "merged", "onto": "original"}


def _pair(trained: Trained, encode: Encode) -> Iterator[tuple[str, Tensor]]:
    names, layers = Names.of(trained.base), quant_layers(trained.model)
    codes = codes_beside_weights(layers)
    mixtures = fused_matrices(trained.base, trained.base_folder)
    left_out = {name for matrix in mixtures for name in matrix.stored}
    for name in (weight for matrix in mixtures for weight in matrix.weights):
        yield from encode(name.removesuffix("weight"), layers[name])
    for stored, name, tensor in distinct_tensors(trained.base_folder, names):
        if name in codes or stored in left_out:
            continue
        if name in layers:
            yield from encode(stored.removesuffix("weight"), layers[name])
        else:
            yield stored, tensor.to(trained.round_to) if tensor.dtype == torch.float32 else tensor


def _merged(
    trained: Trained, encode: Encode, storage_of: StorageOf
) -> Iterator[tuple[str, Tensor]]:
    names, chosen = Names.of(trained.base), quantized_weights(trained)
    for stored, tensor in merged_tensors(
        trained.base_folder,
        trained.model,
        "original",
        start=trained.start,
        round_to=trained.round_to,
    ):
        name = names.in_model(stored)
        if name not in chosen:
            yield stored, tensor
            continue
        dense = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(tensor, requires_grad=False)
        storage = storage_of(name.removesuffix(".weight"))
        yield from encode(stored.removesuffix("weight"), QuantLinear.from_linear(dense, storage))
