"""The adapter folded into 16-bit weights, one tensor at a time.

Sums are taken in float32 and rounded once. `original` adds the adapter to the weights as they were
before quantization; `dequantized` to what the codes stand for, which is the model that was trained.
Which is better is a matter of measuring, so both are here. Tensors that training did not touch pass
through bit for bit. What PEFT itself would do differs in two ways: it adds in 16 bits, and it needs
the whole model in memory. DoRA: arXiv 2402.09353; the norm is that of the weights merged onto, as
when PEFT loads the adapter there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, transpose
from torch import Tensor
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model.checkpoint import Names, bare_name, distinct_tensors, stored_names
from qtune.model.folder import is_quantized
from qtune.model.lora import QuantLoraLinear
from qtune.model.merge_experts import fused_matrices, merged_experts
from qtune.model.start import Start
from qtune.quant.linear import QuantLinear

Onto = Literal["original", "dequantized"]
NO_START: Start = {}
# merged float32 weight of the float32 weight that it is merged onto
Update = Callable[[Tensor], Tensor]


def merged_tensors(
    base_folder: Path,
    model: PeftModel,
    onto: Onto,
    *,
    start: Start = NO_START,
    round_to: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    allow_unchanged: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged tensor, on the CPU and in the stored dtype, of all weights of `base_folder`.

    What the adapter began with, `start`, is no change of the original weights. Tensors stored in
    float32 are rounded to `round_to` if given, all numbers to `dtype` if given. Raises UserError
    for an adapter that has no tensor in the folder or cannot be merged and, at the end, where
    nothing changed unless `allow_unchanged`.
    """
    updates = adapter_updates(model, start if onto == "original" else NO_START)
    dense = quant_layers(model) if onto == "dequantized" else {}
    names = Names.of(base_model(model))
    stored = stored_names(base_folder)
    tuned = any(
        isinstance(layer, QuantLoraLinear) and layer.is_settled for layer in model.modules()
    )
    if onto == "original":
        _need_dense(base_folder)
        _need_codes(tuned)
    known = {other for name in stored for other in names.group(names.in_model(name))}
    mixtures = fused_matrices(base_model(model), base_folder)
    in_mixtures = {name for matrix in mixtures for name in matrix.weights}
    _check_known((updates.keys() | dense.keys()) - in_mixtures, known, base_folder)
    left_out = {name for matrix in mixtures for name in matrix.stored}
    merged = _stream(base_folder, names, updates, dense, (round_to, dtype), left_out)
    experts = (
        merged_experts(
            base_model(model),
            base_folder,
            matrix,
            updates,
            onto_codes=onto == "dequantized",
            dtype=dtype or round_to,
        )
        for matrix in mixtures
    )
    both = chain(merged, chain.from_iterable(experts))
    return _checked(both, bool(updates), allow_unchanged or tuned)


def untied(model: PeftModel) -> bool:
    """Whether training changed one of two tied tensors, so that a merged model has to hold both."""
    names, updates = Names.of(base_model(model)), adapter_updates(model)
    return any(len(names.group(name)) > 1 for name in updates)


def quant_layers(model: PeftModel) -> dict[str, QuantLinear]:
    """The quantized layers by the name of their weight in the base model."""
    return {
        bare_name(f"{name}.weight"): layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, QuantLinear)
    }


def codes_beside_weights(layers: dict[str, QuantLinear]) -> set[str]:
    """Names of the other tensors that a checkpoint of these layers holds."""
    return {
        name.removesuffix("weight") + leaf
        for name, layer in layers.items()
        for leaf in layer.tensor_names
        if leaf != "weight"
    }


def adapter_updates(model: PeftModel, start: Start = NO_START) -> dict[str, Update]:
    """What the active adapter does to each parameter that it changes, by the base model's name.

    What it began with, `start`, is taken off again. Raises UserError for adapters that cannot be
    written as a change of weights.
    """
    (adapter,) = model.active_adapters
    updates: dict[str, Update] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            updates |= _lora_updates(name, layer, adapter, start.get(name))
        elif isinstance(layer, ModulesToSaveWrapper):
            for key, trained in layer.modules_to_save[adapter].named_parameters():
                updates[f"{name}.{key}"] = partial(_replaced, trained)
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise UserError(
                f"{name}: {type(layer).__name__} of PEFT cannot be merged; export the adapter"
            )
    return updates | _trained_biases(model)


def base_model(model: PeftModel) -> PreTrainedModel:
    """The transformers model inside, whose layers the adapter wraps."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def _lora_updates(
    name: str, layer: LoraLayer, adapter: str, begun: tuple[Tensor, Tensor] | None
) -> dict[str, Update]:
    if layer.merged_adapters:
        raise UserError(
            f"{name}: an adapter is merged into this layer in place; call unmerge() first"
        )
    variant = layer.lora_variant.get(adapter)
    if not isinstance(layer, (LoraLinear, Embedding)) or not isinstance(
        variant, (DoraLinearVariant, type(None))
    ):
        kind = type(variant or layer).__name__
        raise UserError(
            f"{name}: an adapter of the kind {kind} cannot be merged; export the adapter"
        )
    updates: dict[str, Update] = {f"{name}.weight": partial(_with_lora, layer, adapter, begun)}
    if layer.lora_bias[adapter]:
        updates[f"{name}.bias"] = partial(_with_lora_bias, layer, adapter)
    return updates


def _with_lora(
    layer: LoraLayer, adapter: str, begun: tuple[Tensor, Tensor] | None, weight: Tensor
) -> Tensor:
    """W + scaling B A - B0 A0, each row then scaled to its trained length with DoRA.

    PEFT keeps adapters in float32, so the product is taken in it.
    """
    assert isinstance(layer, (LoraLinear, Embedding))
    delta: Tensor = layer.get_delta_weight(adapter).float()
    if begun is not None:
        a, b = (part.to(delta.device) for part in begun)
        delta = delta - b @ a
    merged: Tensor = weight.to(delta.device) + delta
    if adapter not in layer.lora_variant:
        return merged
    magnitude = layer.lora_magnitude_vector[adapter].weight.float()
    flip = getattr(layer, "fan_in_fan_out", False)
    rows = transpose(merged, flip)  # [O, I]
    scaled: Tensor = transpose(rows * (magnitude / rows.norm(dim=1)).unsqueeze(1), flip)
    return scaled


def _with_lora_bias(layer: LoraLayer, adapter: str, bias: Tensor) -> Tensor:
    delta: Tensor = layer.lora_B[adapter].bias.float() * layer.scaling[adapter]
    return bias.to(delta.device) + delta


def _replaced(trained: Tensor, _: Tensor) -> Tensor:
    return trained.float()


def _trained_biases(model: PeftModel) -> dict[str, Update]:
    """The biases of the base that were trained themselves (`bias` in the adapter's config)."""
    if model.active_peft_config.bias == "none":
        return {}
    own = {f"{name}.bias" for name in _lora_names(model)}
    every = model.active_peft_config.bias == "all"
    return {
        bare_name(name): partial(_replaced, value)
        for name, value in model.get_base_model().named_parameters()
        if name.endswith(".bias") and ".lora_" not in name and (every or bare_name(name) in own)
    }


def _lora_names(model: PeftModel) -> list[str]:
    modules = model.get_base_model().named_modules()
    return [name for name, layer in modules if isinstance(layer, LoraLayer)]


def _stream(
    folder: Path,
    names: Names,
    updates: dict[str, Update],
    dense: dict[str, QuantLinear],
    rounding: tuple[torch.dtype | None, torch.dtype | None],
    left_out: set[str],
) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether the update changed it."""
    codes = codes_beside_weights(dense)
    for stored, name, tensor in distinct_tensors(folder, names):
        if name in codes or stored in left_out:
            continue
        group = names.group(name)
        base = dense[name].dequantize(torch.float32) if name in dense else tensor
        dtype = dense[name].compute_dtype if tensor.dtype == torch.uint8 else tensor.dtype
        dtype = _rounded(dtype, *rounding)
        if any(other in updates for other in group):
            # tied parameters that go separate ways from here on are all written
            for other in group:
                yield stored if other == name else other, *_merged(other, base, dtype, updates)
        else:
            yield stored, base.to("cpu", dtype), False


def _rounded(
    stored: torch.dtype, round_to: torch.dtype | None, every: torch.dtype | None
) -> torch.dtype:
    """The dtype in which a tensor of that stored dtype is written; integers keep theirs."""
    if every is not None and stored.is_floating_point:
        return every
    return round_to if round_to and stored == torch.float32 else stored


def _merged(
    name: str, base: Tensor, dtype: torch.dtype, updates: dict[str, Update]
) -> tuple[Tensor, bool]:
    before = base.to("cpu", dtype)
    if name not in updates:
        return before.clone(), False
    with torch.no_grad():
        summed = updates[name](base.float())
    if not torch.isfinite(summed).all():
        raise UserError(
            f"{name}: the merged weight is not finite; the adapter is broken, see its loss curve"
        )
    after = summed.to("cpu", dtype)
    return after, not torch.equal(before, after)


def _checked(
    merged: Iterator[tuple[str, Tensor, bool]], has_adapter: bool, allow_unchanged: bool
) -> Iterator[tuple[str, Tensor]]:
    changed = False
    for name, tensor, differs in merged:
        changed |= differs
        yield name, tensor
    if not changed and not allow_unchanged:
        why = "the adapter is zero or too small" if has_adapter else "there is no adapter"
        raise UserError(f"merging changed no weight: {why}; has it been trained?")


def _check_known(wanted: set[str], known: set[str], folder: Path) -> None:
    missing = sorted(wanted - known)
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the tensors that training changed, as {missing[0]}; "
            "name the folder of the base that the adapter was trained on"
        )


def _need_codes(tuned: bool) -> None:
    if tuned:
        raise UserError(
            "trained scales and zero points are those of codes, so they cannot be merged onto the "
            "original weights; set merge.base: dequantized"
        )


def _need_dense(folder: Path) -> None:
    if is_quantized(folder):
        raise UserError(
            f"{folder} is quantized already, so there are no original weights to merge onto; "
            "set merge.base: dequantized, or name the 16-bit model"
        )
