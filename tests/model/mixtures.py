"""Tiny mixtures of experts of the kinds that differ in how they store and run their experts."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.model.load import load_base
from qtune.recipe import Quant

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# one tensor per expert and projection; the same under Mixtral's names; one transposed tensor with
# biases for all experts; experts in the second layer only, and a shared one
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


def save_mixture(folder: Path, family: str) -> Path:
    """A folder with a random bf16 model of the family."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load_mixture(folder: Path) -> PreTrainedModel:
    """The folder's model, quantized while it was read, computing in float32."""
    quant = Quant(group_size=32)
    return load_base(folder, quant, device=torch.device("cpu"), dtype=torch.float32).eval()


def token_ids() -> torch.Tensor:
    """Two rows of nine tokens."""
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
