"""Tiny models of several families, and rows of tokens to calibrate them with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
# biases; other positions and masks in every second block; parallel attention; joined matrices
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi3": {},
}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A maker of folders with a random model of a family."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            # norms near one, so that no block drowns in the next
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def read() -> Callable[[Path], PreTrainedModel]:
    """A reader of dense models in float32."""

    def dense(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return dense


@pytest.fixture
def rows() -> list[list[int]]:
    """Rows of tokens, the last one shorter."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (24, 24, 11)]
