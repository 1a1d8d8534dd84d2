"""The tensors of a quantized export, for exporters that say how one layer is written.

They are the codes of the loaded model, and scales if these were trained; the adapter, if there is
one, goes beside it. A pair holds those that were trained on; for the merged form the model is one
whose codes were found after the merge (`requantized.py`), which has no adapter left.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qtune.export.folder.pair import write_beside
from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import Names, bare_name, distinct_tensors
from qtune.model.merge import codes_beside_weights, quant_layers
from qtune.model.merge_experts import fused_matrices
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import quantized_on_meta
from qtune.model.shards import write_shards
from qtune.quant.linear import QuantLinear

# the tensors of a layer, by full name, given its name with the dot
Encode = Callable[[str, QuantLinear], Iterator[tuple[str, Tensor]]]


def write_quantized(trained: Trained, folder: Path, encode: Encode) -> None:
    """Write the weights, and the adapter where there is one, of `trained` into `folder`."""
    write_shards(quantized_tensors(trained, encode), folder)
    write_beside(trained, folder)


def quantized_tensors(trained: Trained, encode: Encode) -> Iterator[tuple[str, Tensor]]:
    """Name, as in the checkpoint, and tensor of all that is written: of layers what `encode` says.

    What is not quantized is as stored, float32 rounded to the dtype of training.
    """
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
    """What quantized exports change in config.json beside their own entry."""
    return {"dtype": str(trained.dtype).removeprefix("torch.")}


def form_of(trained: Trained) -> dict[str, object]:
    """What qtune.json says of the form of a quantized export."""
    if trained.form == "pair":
        return {"form": "pair"}
    return {"form": "merged", "onto": "original", "method": trained.recipe.quant.method}
