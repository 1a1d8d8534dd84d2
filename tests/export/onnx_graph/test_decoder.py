"""Whole decoders in ONNX Runtime, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qtune.errors import UserError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qtune.export.consumers.onnx import load
from qtune.export.onnx_graph.decoder import add_decoder, check
from qtune.export.onnx_graph.graph import DATA, Graph

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama 3, tied": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "one head each": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "mistral, whole": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5),
    "mistral, wide heads": MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def make(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(torch.randn_like(tensor) * (0.2 if "norm" in name else 0.1))
    return model.eval()


def write(model: PreTrainedModel, folder: Path) -> Path:
    with (folder / DATA).open("wb") as data, torch.no_grad():
        graph = Graph(data)
        add_decoder(graph, model)
        graph.save(folder)
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = make(FAMILIES[family])
    found = load(write(model, tmp_path))
    ids = torch.randint(96, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (found(input_ids=ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen3"])
def test_generation_goes_on_from_its_cache(family: str, tmp_path: Path) -> None:
    model = make(FAMILIES[family])
    found = load(write(model, tmp_path))
    ids = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **settings, eos_token_id=None)
    assert torch.equal(found.generate(input_ids=ids, **settings, eos_token_id=None), expected)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (FalconConfig(), "falcon"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "gelu"),
        (
            LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "dynamic",
        ),
    ],
)
def test_other_models_are_refused_by_name(config: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check(config)
