from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

pytest.importorskip("xllamacpp")

from qtune.export.consumers import llamacpp
from qtune.export.gguf_file.base import write_base

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0,
    "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [2.0 + i / 4 for i in range(16)],
}  # fmt: skip
GEMMA = SIZES | {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(tie_word_embeddings=True, **SIZES),
    "llama with a head": LlamaConfig(attention_bias=True, **SIZES),
    "llama 3": LlamaConfig(rope_parameters=LLAMA3, **SIZES),
    "linear": LlamaConfig(rope_parameters=LINEAR, **SIZES),
    "yarn": Qwen2Config(rope_parameters=YARN, **SIZES),
    "mistral": MistralConfig(head_dim=64, sliding_window=None, **SIZES),
    "qwen2": Qwen2Config(tie_word_embeddings=True, **SIZES),
    "qwen3": Qwen3Config(head_dim=64, **SIZES),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 6}),
    "phi3": Phi3Config(sliding_window=None, **SIZES),
    "phi3 short": Phi3Config(rope_parameters=LONG, sliding_window=None, **SIZES),
    "phi3 long": Phi3Config(
        rope_parameters=LONG, sliding_window=None, original_max_position_embeddings=32, **SIZES
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_llamacpp_computes_what_transformers_does(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Logits agree to float16, of weights large enough for any wrong place or constant to show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.mul_(3 if "embed" not in name else 1)
            weight.copy_(weight.half())
    model.save_pretrained(tmp_path)
    for path in bases["llama"].glob("tokenizer*"):
        copyfile(path, tmp_path / path.name)

    write_base(tmp_path, tmp_path / "base.gguf")
    loaded = llamacpp.load(tmp_path / "base.gguf", tmp_path)
    ids = torch.randint(3, 259, (1, 60))
    with torch.no_grad():
        expected = model(ids).logits

    found = loaded(ids).logits
    spread = expected.std(-1, keepdim=True)
    assert ((found - expected) / spread).abs().max() < 0.02
