from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
)

from qtune.errors import UserError
from qtune.export.gguf_file.hyperparameters import add_hyperparameters, check_config
from qtune.export.gguf_file.write import opened


def metadata(config: Any, folder: Path) -> dict[str, Any]:
    with opened(folder / "x.gguf", "x") as writer:
        add_hyperparameters(writer, config)
    fields = GGUFReader(folder / "x.gguf").fields
    return {name[2:]: field.contents() for name, field in fields.items() if name.startswith("x.")}


def test_sizes(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, vocab_size=77,
        max_position_embeddings=555,
    )  # fmt: skip
    found = metadata(config, tmp_path)
    assert found["block_count"] == 3 and found["context_length"] == 555
    assert found["embedding_length"] == 96 and found["feed_forward_length"] == 160
    assert found["attention.head_count"] == 6 and found["attention.head_count_kv"] == 2
    assert found["attention.key_length"] == found["attention.value_length"] == 32
    assert found["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert found["vocab_size"] == 77


def test_gemma_has_windows_and_caps(tmp_path: Path) -> None:
    config = Gemma2Config(sliding_window=64, attn_logit_softcapping=40.0)
    found = metadata(config, tmp_path)
    assert found["attention.sliding_window"] == 64
    assert found["attn_logit_softcapping"] == 40 and found["final_logit_softcapping"] == 30


def test_phi_says_where_it_has_no_window(tmp_path: Path) -> None:
    assert metadata(Phi3Config(sliding_window=None), tmp_path)["attention.sliding_window"] == 0


def test_a_text_ends_where_a_window_would_begin(tmp_path: Path) -> None:
    config = MistralConfig(sliding_window=4096, max_position_embeddings=32768)
    assert metadata(config, tmp_path)["context_length"] == 4096
    config = MistralConfig(sliding_window=None, max_position_embeddings=32768)
    assert metadata(config, tmp_path)["context_length"] == 32768


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LlamaConfig(hidden_act="relu"), "the activation relu"),
        (Gemma2Config(hidden_activation="silu"), "the activation silu"),
        (Gemma2Config(query_pre_attn_scalar=99), "query_pre_attn_scalar 99"),
        (Gemma3TextConfig(layer_types=["full_attention"] * 26), "the layer types"),
    ],
)
def test_what_llamacpp_computes_in_another_way_is_refused(
    config: PreTrainedConfig, what: str
) -> None:
    with pytest.raises(UserError, match=what):
        check_config(config)


def test_ordinary_models_pass() -> None:
    for config in (LlamaConfig(), MistralConfig(), Phi3Config(), Gemma2Config()):
        check_config(config)
    check_config(Gemma3TextConfig())
