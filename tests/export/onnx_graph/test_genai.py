"""The settings that onnxruntime-genai reads."""

import pytest
from transformers import LlamaConfig

pytest.importorskip("onnx")

from qtune.export.onnx_graph.genai import genai_config


def test_names_and_sizes_are_those_of_the_graph() -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, max_position_embeddings=512,
    )  # fmt: skip
    found = genai_config(config, {"eos_token_id": [1, 2], "bos_token_id": 0})
    model = found["model"]
    assert (model["eos_token_id"], model["bos_token_id"]) == ([1, 2], 0)
    assert "pad_token_id" not in model
    assert (model["context_length"], model["vocab_size"]) == (512, 99)
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 2)
    assert decoder["inputs"]["past_key_names"] % 2 == "past_key_values.2.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert found["search"]["max_length"] == 512
