"""Mixtures of experts: their fused 3-D weights as quantized layers, one for each expert and matrix.

transformers keeps the experts of a layer in two parameters, [E, 2 I, H] and [E, H, I], which a
quantizer of linear layers does not see. Here each expert's matrix becomes a QuantLinear, so that
kernels, adapters, memory plans and exports treat it like any other. A token's K experts run on
tokens sorted by expert; sums over K are taken in a fixed order, so that a step gives the same bits
each time, which adding from several places at once would not.

Left as they are: experts with a norm behind each (`has_post_expert_norm`), and routers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qtune.quant.linear import QuantLinear

NAME = "qtune"
# what transformers may call the matrices of a layer's experts
MATRICES = ("gate_up_proj", "up_proj", "down_proj")
# in features, out features -> an empty layer
MakeLayer = Callable[[int, int], QuantLinear]


def quantized_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y [T, H] of tokens [T, H], the experts [T, K] of each and their weights [T, K].

    What transformers calls as the forward of an experts module once `take_layers` was called on it.
    """
    if fused_weights(experts):
        # left dense by `quant.skip`, in a model where others are quantized
        dense: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](
            experts, hidden_states, top_k_index, top_k_weights
        )
        return dense
    num_chosen = top_k_index.shape[-1]
    expert_of = top_k_index.flatten()
    order = expert_of.argsort(stable=True)
    x = hidden_states.repeat_interleave(num_chosen, 0).index_select(0, order)
    parts = x.split(_counts(expert_of, experts.num_experts))
    # processes that average gradients wait for those of every adapter, also of an expert that
    # none of their own tokens chose
    trained = not all(map(len, parts)) and any(p.requires_grad for p in experts.parameters())
    y = torch.cat([_expert(experts, i, p) for i, p in enumerate(parts) if len(p) or trained])
    y = y * top_k_weights.flatten().index_select(0, order).unsqueeze(1)
    in_place = y.index_select(0, order.argsort()).unflatten(0, (-1, num_chosen))
    summed: Tensor = in_place.sum(1).to(hidden_states.dtype)
    return summed


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds fused experts that `quantized_experts` computes as they do."""
    marks = ("num_experts", "is_transposed", "has_gate", "has_bias", "_apply_gate")
    return (
        all(hasattr(module, mark) for mark in marks)
        and not getattr(module, "has_post_expert_norm", False)
        and bool(fused_weights(module))
    )


def fused_weights(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The fused 3-D weights of experts, by their names."""
    found = {name: experts._parameters.get(name) for name in MATRICES}
    return {
        name: weight for name, weight in found.items() if weight is not None and weight.ndim == 3
    }


def take_layers(experts: Any, make: MakeLayer, *names: str) -> None:
    """Put E empty layers in the place of each of the named fused weights."""
    for name in names:
        rows, columns = fused_weights(experts)[name].shape[1:]
        sizes = (rows, columns) if experts.is_transposed else (columns, rows)
        del experts._parameters[name]
        # PEFT goes by the last part of a name, and numbers alone are what blocks are called
        layers = {key(i): make(*sizes) for i in range(experts.num_experts)}
        experts.add_module(name, nn.ModuleDict(layers))
    experts.config._experts_implementation = NAME


def pack(experts: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The packed tensors of the experts' fused weight `name`, by their names below `experts`."""
    matrices = weight.transpose(1, 2) if experts.is_transposed else weight
    layers = getattr(experts, name).items()
    return {
        f"{name}.{expert}.{leaf}": tensor
        for (expert, layer), matrix in zip(layers, matrices, strict=True)
        for leaf, tensor in layer.pack(matrix).items()
    }


def expert_layers(model: nn.Module) -> Iterator[tuple[str, bool, dict[str, nn.Module]]]:
    """Name of every matrix of experts, whether it is stored transposed, and its layers by name."""
    for path, experts in model.named_modules():
        for name in MATRICES:
            layers = experts._modules.get(name)
            if isinstance(layers, nn.ModuleDict) and hasattr(experts, "is_transposed"):
                named = {f"{path}.{name}.{expert}": layer for expert, layer in layers.items()}
                yield f"{path}.{name}", bool(experts.is_transposed), named


def key(i: int) -> str:
    """What expert i is called among the layers of a matrix."""
    return f"expert_{i}"


def register() -> None:
    """Make transformers know these experts; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, quantized_experts)


def _expert(experts: Any, i: int, x: Tensor) -> Tensor:
    """Expert i's output [n, H] for its tokens [n, H]."""
    if experts.has_gate:
        h = experts._apply_gate(_matrix(experts, "gate_up_proj", i, x))
    else:
        h = experts.act_fn(_matrix(experts, "up_proj", i, x))
    return _matrix(experts, "down_proj", i, h)


def _matrix(experts: Any, name: str, i: int, x: Tensor) -> Tensor:
    y: Tensor = getattr(experts, name)[key(i)](x)
    return y + getattr(experts, f"{name}_bias")[i].to(y.dtype) if experts.has_bias else y


def stored_tensors(
    model: PreTrainedModel, name: str, fused: Tensor, *, transposed: bool
) -> dict[str, Tensor]:
    """The tensors that a checkpoint of this model holds in place of its fused weight `name`.

    `fused` is [E, O, I]. Most checkpoints have one tensor for each expert and projection.
    """
    own = fused.transpose(1, 2).contiguous() if transposed else fused
    inside: Any = model
    before = inside._weight_conversions
    # those of a quantized load cannot be reverted; without them transformers takes the model's own
    inside._weight_conversions = None
    try:
        found: dict[str, Tensor] = revert_weight_conversion(model, {name: own})
    finally:
        inside._weight_conversions = before
    return found


def _counts(expert_of: Tensor, num_experts: int) -> list[int]:
    """How many tokens each expert gets; where there is no data, the first one stands for all."""
    if expert_of.is_meta:
        return [len(expert_of)] + [0] * (num_experts - 1)
    counts: list[int] = torch.bincount(expert_of, minlength=num_experts).tolist()
    return counts
