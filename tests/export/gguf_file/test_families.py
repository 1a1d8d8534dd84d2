import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

from qtune.errors import UserError
from qtune.export.gguf_file.families import TensorNames, family_of, interleaved, rope_dimensions


def test_halves_of_each_head_become_pairs() -> None:
    rows = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert interleaved(rows, 2).tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    matrix = rows[:, None] * torch.ones(3)
    assert interleaved(matrix, 2)[:, 1].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_only_llama_turns_queries_and_keys() -> None:
    rows = torch.arange(16.0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama, qwen = TensorNames(LlamaConfig(**config)), TensorNames(Qwen2Config(**config))
    query, key = (f"model.layers.0.self_attn.{part}_proj.bias" for part in "qk")
    assert torch.equal(llama.value(query, rows), interleaved(rows, 4))
    assert torch.equal(llama.value(key, rows), interleaved(rows, 2))
    assert torch.equal(llama.value(key.replace("k_proj", "v_proj"), rows), rows)
    assert torch.equal(qwen.value(query, rows), rows)


def test_gemma_adds_one_to_its_norms() -> None:
    names, rows = TensorNames(Gemma2Config()), torch.tensor([0.5], dtype=torch.bfloat16)
    assert names.value("model.norm.weight", rows).tolist() == [1.5]
    assert names.value("model.layers.3.mlp.up_proj.weight", rows).tolist() == [0.5]


def test_names() -> None:
    names = TensorNames(Phi3Config())
    assert names.name("model.layers.7.self_attn.qkv_proj.weight") == "blk.7.attn_qkv.weight"
    assert names.name("model.layers.7.mlp.gate_up_proj.weight") == "blk.7.ffn_up.weight"
    assert names.name("lm_head.weight") == "output.weight"
    with pytest.raises(UserError, match=r"lm_head.weight: llama.cpp has no such tensor in gemma2"):
        TensorNames(Gemma2Config()).name("lm_head.weight")


def test_unknown_families_are_refused() -> None:
    with pytest.raises(UserError, match="no GGUF files of mamba models"):
        family_of("mamba")


def test_a_part_of_each_head_may_be_rotated() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}
    config = Phi3Config(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    assert rope_dimensions(config) == 96
