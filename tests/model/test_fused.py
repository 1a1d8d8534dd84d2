"""Fused models against the same models as transformers has them."""

import copy
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qtune.model import fused as fused_modules
from qtune.model.attention import packed_inputs, register, use_packed
from qtune.model.fused import fuse
from qtune_kernels import rows
from qtune_kernels.linear_tiles import most_fused_rows
from qtune_kernels.rows import ROOM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS = [LlamaConfig, MistralConfig, Qwen3Config, Gemma2Config, Gemma3TextConfig, Phi3Config]
NORMS_A_BLOCK = {Gemma2Config: 4, Gemma3TextConfig: 6, Qwen3Config: 4}
FAMILIES = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def make(config: Any, **settings: Any) -> PreTrainedModel:
    """A random model whose norms are not all ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES | settings))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


def pair(config: Any, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = make(config, **settings)
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused


def outputs(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all that can be trained."""
    model = copy.deepcopy(model).to(dtype)
    tokens = torch.arange(24).view(2, 12) * 5 % 64
    logits = model(input_ids=tokens).logits
    cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    gradients = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {"logits": logits, **gradients}


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    result, truth = result.detach().double(), truth.detach().double()
    return float((result - truth).norm() / truth.norm().clamp_min(1e-12))


@FAMILIES
def test_every_norm_mlp_and_rotation_is_found(config) -> None:
    model = make(config)
    names = fuse(model)
    blocks = [name.split(".", 3)[3] for name in names if ".layers.1." in name]
    assert {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} <= set(blocks)
    assert len(blocks) == 2 + NORMS_A_BLOCK.get(config, 2) and "model.norm" in names
    assert fuse(model) == []


@FAMILIES
def test_float32_results_and_gradients_are_the_same(config) -> None:
    model, fused = pair(config)
    plain, ours = outputs(model, torch.float32), outputs(fused, torch.float32)
    assert ours.keys() == plain.keys()
    assert {name: e for name in plain if (e := error(ours[name], plain[name])) > 1e-4} == {}


@FAMILIES
def test_bf16_results_are_as_exact_as_before(config) -> None:
    model, fused = pair(config)
    truth = outputs(model, torch.float32)
    plain, ours = outputs(model, torch.bfloat16), outputs(fused, torch.bfloat16)
    for name, right in truth.items():
        assert error(ours[name], right) <= 1.5 * error(plain[name], right) + 0.01, name


@FAMILIES
def test_models_without_weights_are_fused_alike(config) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config(**SIZES))
    assert fuse(empty) == fuse(make(config))
    logits = empty(input_ids=torch.zeros(1, 7, dtype=torch.int64, device="meta")).logits
    assert logits.is_meta and logits.shape == (1, 7, 64)


def test_weights_are_saved_and_loaded_under_their_names(tmp_path) -> None:
    model, fused = pair(Qwen3Config)
    assert fused.state_dict().keys() == model.state_dict().keys()
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(loaded.model.norm) is type(model.model.norm)
    results = [outputs(one, torch.float32)["logits"] for one in (model, loaded)]
    assert torch.equal(*results)


def test_other_models_of_the_class_stay_as_they_are() -> None:
    model, fused = pair(LlamaConfig)
    assert type(model.model.norm) is LlamaRMSNorm is not type(fused.model.norm)
    assert isinstance(fused.model.norm, LlamaRMSNorm)
    assert type(fused.model.layers[0].mlp) is type(fused.model.layers[1].mlp)
    assert type(model.model.layers[0].mlp) is LlamaMLP


def test_adapters_are_put_in_the_same_places() -> None:
    results = []
    for model in pair(LlamaConfig):
        torch.manual_seed(1)
        lora = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
        results.append(outputs(get_peft_model(model, lora), torch.float32))
    plain, ours = results
    assert ours.keys() == plain.keys() and len(ours) == 1 + 2 * 7 * 2
    assert {name: e for name in plain if (e := error(ours[name], plain[name])) > 1e-4} == {}


def test_packed_rows_stay_separate() -> None:
    register()
    results = []
    for model in pair(LlamaConfig):
        use_packed(model)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        tokens = positions + 5
        results.append(model(input_ids=tokens, **packed_inputs(positions, [4, 3])).logits)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[1][0, :3], results[1][0, 4:])


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    model, fused = pair(LlamaConfig)
    for block in fused.model.layers:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    fused.train()
    plain, ours = outputs(model, torch.float32), outputs(fused, torch.float32)
    assert {name: e for name in plain if (e := error(ours[name], plain[name])) > 1e-4} == {}


@pytest.mark.parametrize("config", [Qwen3Config, Phi3Config])
def test_room_is_asked_for_on_cuda_behind_the_many_rows_of_layers(config, monkeypatch) -> None:
    model = make(config)
    fuse(model)
    spies = {name: Mock(wraps=getattr(fused_modules, name)) for name in ("rms_norm", "gated")}
    for name, spy in spies.items():
        monkeypatch.setattr(fused_modules, name, spy)
    many = most_fused_rows(torch.device("cpu")) + 1
    for device, num_tokens, room in (("cuda", many, 0), ("cpu", 4, 0), ("cpu", many, ROOM)):
        monkeypatch.setattr(rows, "DEVICE", device)
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64))
        calls = [call.args for spy in spies.values() for call in spy.call_args_list]
        assert {args[-1] for args in calls if args[0].dim() == 3} == {room}
        assert {args[-1] for args in calls if args[0].dim() == 4} <= {0}
        for spy in spies.values():
            spy.reset_mock()


def test_norms_kept_in_float32_give_what_they_gave() -> None:
    model, fused = pair(LlamaConfig)
    for one in (model.bfloat16(), fused.bfloat16()):
        one.model.norm.float()
    x = torch.randn(2, 3, 32).bfloat16()
    assert torch.equal(fused.model.norm(x), model.model.norm(x))
    assert fused.model.norm(x).dtype == torch.float32


def test_random_numbers_stay_as_they_were() -> None:
    model = make(LlamaConfig)
    before = torch.random.get_rng_state()
    fuse(model)
    assert torch.equal(torch.random.get_rng_state(), before)


class ClampedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=7)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class DroppingMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.dropout(y, 0.1, self.training)


class OtherArgumentsMLP(LlamaMLP):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * super().forward(x)


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


@pytest.mark.parametrize("kind", [ClampedMLP, DroppingMLP, OtherArgumentsMLP])
def test_mlps_that_do_more_are_left_alone(kind) -> None:
    mlp = kind(LlamaConfig(**SIZES)).eval()
    assert fuse(mlp) == [] and type(mlp) is kind and not mlp.act_fn.training


def test_mlps_with_another_activation_are_left_alone() -> None:
    assert fuse(LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))) == []
    assert fuse(LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))) == []
    assert fuse(LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"))) == [""]


@pytest.mark.parametrize("kind", [CenteredRMSNorm, GatedRMSNorm])
def test_norms_that_do_more_are_left_alone(kind) -> None:
    norm = kind(32)
    assert fuse(norm) == [] and type(norm) is kind


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    norm = LlamaRMSNorm(32)
    norm.forward = lambda x: x
    assert fuse(norm) == [] and type(norm) is LlamaRMSNorm
