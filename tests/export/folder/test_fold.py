"""Folding channel factors leaves the function of a model as it is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qtune.errors import UserError
from qtune.export.folder.fold import fold, foldable, replace_tensors
from qtune.model.fused import fuse
from qtune.model.quant_config import QtuneConfig
from qtune.model.quantizer import quantized_on_meta
from qtune.quant.linear import QuantLinear

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SINGLE = {**SIZES, "num_key_value_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SINGLE),
    "llama, grouped queries": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**SINGLE),
    "qwen2": Qwen2Config(**SINGLE),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**SINGLE, query_pre_attn_scalar=16),
}
SETTINGS = {"format": "int4", "group_size": 32, "channels": True}


def dense_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                # an offset is part of it where the norm adds one
                tensor.add_(torch.rand_like(tensor) * 0.5)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.1)
            else:
                # so large that every layer counts
                tensor.mul_(8)
    fuse(model)
    return model.eval()


def storages(config: Any, settings: dict[str, Any]) -> QtuneConfig:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fuse(skeleton)
    quantized_on_meta(skeleton, QtuneConfig(**settings))
    return foldable(skeleton, QtuneConfig(**settings))


def quantized(config: Any, settings: dict[str, Any] = SETTINGS) -> PreTrainedModel:
    """A model with uneven factors, the same for layers that share an input."""
    model, found = dense_model(config), storages(config, settings)
    # what layers share is known here by their widths and places alone
    shared: dict[str, Tensor] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        kind = {"o_proj": "o", "down_proj": "down", "gate_proj": "mlp", "up_proj": "mlp"}
        key = name.rsplit(".", 2)[0] + kind.get(name.rsplit(".", 1)[1], "attention")
        factors = torch.exp2(torch.randn(layer.in_features))
        factors = shared.setdefault(key, factors)
        made = QuantLinear.from_linear(layer, found.storage(name))
        if made.storage.channels:
            made.load(made.pack(layer.weight, factors))
        model.set_submodule(name, made)
    model.config.quantization_config = found
    return model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_but_for_the_rounding_of_scales(family: str) -> None:
    model = quantized(FAMILIES[family])
    before = logits(model)
    changed = fold(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert not any(layer.storage.channels for layer in layers.values())
    assert (logits(model) - before).norm() < 2e-3 * before.norm()
    assert {name for name in changed if "norm" in name and name.endswith("weight")} == {
        f"model.layers.{i}.{norm}.weight"
        for i in range(2)
        for norm in (
            "input_layernorm",
            "pre_feedforward_layernorm" if family == "gemma2" else "post_attention_layernorm",
        )
    }


def test_factors_that_are_powers_of_two_leave_the_function_exactly() -> None:
    model = quantized(FAMILIES["llama"])
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            factors = layer.channel_factors
            assert factors is not None
            halves = torch.exp2(factors.float().log2().round())
            layer.load(layer.pack(layer.dequantize(torch.float32), halves))
    before = logits(model)
    fold(model)
    assert (logits(model) - before).norm() < 1e-6 * before.norm()


def test_codes_stay_and_scales_take_the_factors() -> None:
    model = quantized(FAMILIES["llama"])
    name = "model.layers.1.mlp.up_proj"
    old = model.get_submodule(name)
    factors = model.get_submodule("model.layers.1.mlp.down_proj").channel_factors.float()
    inner = old.dequantize_inner(torch.float32)
    codes = old.weight.clone()
    fold(model)
    new = model.get_submodule(name)
    assert torch.equal(new.weight, codes)
    assert torch.allclose(new.dequantize(torch.float32), inner * factors[:, None], rtol=2**-10)
    config = model.config.quantization_config
    assert not config.channels and config.storage(name) == new.storage
    assert config.storage("model.layers.1.mlp.down_proj").scales is None


def test_layers_behind_nothing_that_could_take_factors_have_none() -> None:
    found = storages(FAMILIES["llama, grouped queries"], SETTINGS)
    block = "model.layers.0"
    assert not found.storage(f"{block}.self_attn.o_proj").channels
    assert found.storage(f"{block}.self_attn.q_proj").channels
    # one of those that share the input stays in 16 bits
    skipping = SETTINGS | {"skip": ["lm_head", "k_proj"]}
    found = storages(FAMILIES["llama"], skipping)
    assert not found.storage(f"{block}.self_attn.q_proj").channels
    # a group ends in the middle of a row of up_proj
    straddling = storages(FAMILIES["llama"], SETTINGS | {"group_size": 128})
    assert not straddling.storage(f"{block}.mlp.down_proj").channels
    assert straddling.storage(f"{block}.mlp.up_proj").channels


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96),
        Olmo2Config(**SINGLE),
    ],
    ids=["gpt2", "olmo2"],
)
def test_other_structures_are_refused_by_name(config: Any) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserError, match=type(skeleton).__name__):
        foldable(skeleton, QtuneConfig(**SETTINGS))


def test_a_model_that_only_looks_alike_is_found_out() -> None:
    model = quantized(FAMILIES["llama"])
    for layer in model.model.layers:
        mlp = layer.mlp
        # not proportional to what up_proj gives
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj((mlp.gate_proj(x) * mlp.up_proj(x)) ** 3)
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        fold(model)


def test_folder_gets_what_changed(tmp_path: Path) -> None:
    model = dense_model(FAMILIES["llama"])
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    replace_tensors(tmp_path, model, {name: torch.full((64,), math.pi, dtype=torch.float64)})
    after = load_file(tmp_path / "model.safetensors")
    assert torch.equal(after.pop(name), torch.full((64,), math.pi))
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert len(after) == len(before) - 1
    assert [path.name for path in tmp_path.glob("*.partial")] == []
