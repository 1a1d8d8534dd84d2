"""The channel factors of AWQ (arXiv 2306.00978, section 3) folded into what is before a layer.

A layer with factors multiplies its inputs before it works on them, which no container but our own
can say. But what makes these inputs can be multiplied instead: the weight of the norm before
queries, keys and values, or before gate and up; the rows of the value matrix before the output of
attention, and of up before down. The function stays what it was but for the rounding of norms and
scales to 16 bits; codes stay the very same. Where a row of values serves several heads (grouped
queries) the output of attention has other factors for each, so there it has none.

Which modules these are is known by their names in Llama and all models that took them over. One
that is made otherwise is refused, and one that only looks alike is found out by running it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.model.blocks import blocks
from qtune.model.checkpoint import Names, weight_files
from qtune.model.quant_config import QtuneConfig
from qtune.quant.format import Params
from qtune.quant.linear import QuantLinear
from qtune_kernels.packing import unpack
from qtune_kernels.scales import dequantize_scales, unpack_zeros

# what makes an input, by the first of its names that a block has, and the layers it is given to
PLACES = (
    (("input_layernorm",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (("self_attn.v_proj",), ("self_attn.o_proj",)),
    (
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    (("mlp.up_proj",), ("mlp.down_proj",)),
)
# tokens on which a folded model is compared with what it was
NUM_TOKENS = 16
# of the logits' length; in float32 rounded scales change less than a percent, a wrong place most
MOST_CHANGE = 0.05


@dataclass(frozen=True)
class Fold:
    """Names of the module that makes an input, and of the layers that are given it."""

    source: str
    layers: tuple[str, ...]


def foldable(model: PreTrainedModel, config: QtuneConfig) -> QtuneConfig:
    """`config` with channel factors only where they can be folded.

    `model` is one that is stored so, and may be on `meta`. Raises UserError where it is made of
    other parts than those known.
    """
    found = QtuneConfig(**config.to_dict())
    within = {name for each in _folds(model) for name in each.layers}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and name not in within:
            found.change(name, channels=False)
    return found


@torch.no_grad()
def fold(model: PreTrainedModel) -> dict[str, Tensor]:
    """The dense tensors, by name, that folding all channel factors of the model has changed.

    Layers of one input have the same factors. The tensors are float32; the model has them in its
    own dtype. Raises UserError where the model is another then.
    """
    changed: dict[str, Tensor] = {}
    sources = []
    with _in_float32(model):
        before = _logits(model)
        for each in _folds(model):
            changed |= _fold(model, each)
            sources.append(each.source)
        _check_same(model, before)
    model.config.quantization_config = _config(model, sources)
    return changed


def replace_tensors(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Put tensors, by their names in the model, in the place of those in its folder."""
    names = Names.of(model)
    for path in weight_files(folder):
        stored = load_file(path)
        found = {
            name: tensors[names.in_model(name)].to("cpu", tensor.dtype).contiguous()
            for name, tensor in stored.items()
            if names.in_model(name) in tensors
        }
        if found:
            partial = path.with_suffix(".partial")
            save_file(stored | found, partial, metadata={"format": "pt"})
            partial.replace(path)


def _folds(model: PreTrainedModel) -> Iterator[Fold]:
    """Where the model's layers have channel factors that can be folded."""
    names = {block: name for name, block in model.named_modules()}
    for block in blocks(model):
        inner = dict(block.named_modules())
        for sources, layers in PLACES:
            source = next((name for name in sources if name in inner), None)
            if source is None or not all(name in inner for name in layers):
                raise _unknown(model)
            if _takes(model, inner[source], [inner[name] for name in layers]):
                at = f"{names[block]}."
                yield Fold(at + source, tuple(at + name for name in layers))


def _takes(model: PreTrainedModel, source: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether all layers have factors, and their source can take them."""
    if not all(isinstance(layer, QuantLinear) and layer.storage.channels for layer in layers):
        return False
    if isinstance(source, QuantLinear):
        (layer,) = layers
        whole = source.in_features % source.group_size == 0
        return whole and source.out_features == layer.in_features
    if isinstance(source, nn.Linear):
        return False
    if _offset(source) is None:
        raise _unknown(model)
    return True


def _offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies; None: it is no norm that is known."""
    if isinstance(norm, nn.LayerNorm):
        return 0.0
    found: float | None = getattr(norm, "fused_offset", None)
    return found


def _fold(model: PreTrainedModel, each: Fold) -> dict[str, Tensor]:
    """Fold the factors of layers of one input; the dense tensors that are others now."""
    layers = [_quantized(model, name) for name in each.layers]
    factors = [layer.channel_factors for layer in layers]
    assert factors[0] is not None
    assert all(torch.equal(factors[0], other) for other in factors if other is not None)
    for name, layer in zip(each.layers, layers, strict=True):
        model.set_submodule(name, _without_factors(layer))
    return _scale(model, each.source, factors[0].float())


def _scale(model: PreTrainedModel, name: str, factors: Tensor) -> dict[str, Tensor]:
    """Multiply what the module of that name gives; its dense tensors that are others now."""
    module, changed = model.get_submodule(name), {}
    if isinstance(module, QuantLinear):
        module = _scaled_rows(module, factors)
        model.set_submodule(name, module)
    else:
        changed["weight"] = _scaled(module.get_parameter("weight"), factors, _offset(module) or 0.0)
    if getattr(module, "bias", None) is not None:
        changed["bias"] = _scaled(module.get_parameter("bias"), factors)
    for leaf, tensor in changed.items():
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    return {f"{name}.{leaf}": tensor for leaf, tensor in changed.items()}


def _scaled(vector: Tensor, factors: Tensor, offset: float = 0.0) -> Tensor:
    return ((vector.float() + offset) * factors - offset).to(vector.dtype)


def _scaled_rows(layer: QuantLinear, factors: Tensor) -> QuantLinear:
    """The layer with its outputs times factors [O]: the same codes, and scales in float16."""
    packed, stored = layer.quant_weight
    scales = dequantize_scales(stored).view(layer.out_features, -1) * factors.unsqueeze(1)
    zeros = stored.zeros
    if zeros is not None:
        zeros = unpack_zeros(zeros, layer.format.bits, scales.numel())
    made = _like(layer, scales="half")
    codes = unpack(packed, layer.format.bits, layer.in_features * layer.out_features)
    settled = made.settle(Params(scales.reshape(-1), zeros))
    made.load(made.store(codes.view(layer.shape), settled, layer.channel_factors))
    return made


def _without_factors(layer: QuantLinear) -> QuantLinear:
    """The layer for inputs that are multiplied already."""
    made = _like(layer, channels=False)
    made.load({name: getattr(layer, name) for name in made.tensor_names})
    return made


def _like(layer: QuantLinear, **changes: object) -> QuantLinear:
    """An empty layer with the bias of this one, stored otherwise in these fields."""
    storage = replace(layer.storage, **changes)  # type: ignore[arg-type]
    sizes = layer.in_features, layer.out_features
    made = QuantLinear(*sizes, storage=storage, compute_dtype=layer.compute_dtype, device="meta")
    made.register_parameter("bias", layer.bias)
    return made


def _config(model: PreTrainedModel, sources: list[str]) -> QtuneConfig:
    """How the folded model is stored: without factors, and the scales of some layers in float16."""
    config = QtuneConfig(**model.config.quantization_config.to_dict() | {"channels": False})
    for fields in config.layers.values():
        fields.pop("channels", None)
    config.layers = {name: fields for name, fields in config.layers.items() if fields}
    for name in sources:
        if isinstance(model.get_submodule(name), QuantLinear):
            config.change(name, scales="half")
    return config


def _quantized(model: PreTrainedModel, name: str) -> QuantLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile dense parameters are in float32, where a check sees more than rounding.

    Buffers stay as they are: rotations are in float32 whatever the model is in.
    """
    dense = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    _cast(model, dict.fromkeys(dense, torch.float32))
    try:
        yield
    finally:
        _cast(model, dense)


def _cast(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits, float32 [T, V], of the first token ids."""
    ids = torch.arange(NUM_TOKENS, device=model.device).unsqueeze(0) % model.config.vocab_size
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return found


def _check_same(model: PreTrainedModel, before: Tensor) -> None:
    change = (_logits(model) - before).norm() / before.norm()
    if not change < MOST_CHANGE:
        raise _unknown(model)


def _unknown(model: PreTrainedModel) -> UserError:
    return UserError(
        f"merge.method: awq scales what layers are given, and where {type(model).__name__} makes "
        "that is not known; set merge.method: gptq"
    )
