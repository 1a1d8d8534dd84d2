import math

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtune.errors import UserError
from qtune.model.gguf_config import generation_config, model_config


def config_of(path):
    reader = GGUFReader(path)
    return model_config({k: f.contents() for k, f in reader.fields.items()}, reader, path)


def test_values_of_the_file(tiny_gguf, tmp_path):
    tiny_gguf().write(tmp_path / "x.gguf")
    config = config_of(tmp_path / "x.gguf")
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.max_position_embeddings == 128
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (
        2,
        16,
        True,
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.architectures == ["LlamaForCausalLM"]


def test_every_stop_id_ends_an_answer():
    meta = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7}
    assert generation_config(meta)["eos_token_id"] == [5, 7]
    assert generation_config({**meta, "tokenizer.ggml.eot_token_id": 5})["eos_token_id"] == 5
    assert "eos_token_id" not in generation_config({})


def llama3_factors(factor):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 100000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=16, hidden_size=64, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = 100000.0 ** (-np.arange(0, 16, 2) / 16)
    return scaling, (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_its_factors(tiny_gguf, tmp_path, factor):
    scaling, factors = llama3_factors(factor)
    tiny_gguf(extra={"rope_freqs.weight": factors}).write(tmp_path / "x.gguf")
    found = config_of(tmp_path / "x.gguf").rope_parameters
    assert math.isclose(found.pop("factor"), scaling.pop("factor"), rel_tol=1e-5)
    assert found == scaling


def test_other_factors_are_refused(tiny_gguf, tmp_path):
    tiny_gguf(extra={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}).write(
        tmp_path / "x.gguf"
    )
    with pytest.raises(UserError, match="frequency factors"):
        config_of(tmp_path / "x.gguf")


def test_linear_scaling(tiny_gguf, tmp_path):
    meta = {
        "llama.rope.scaling.type": ("linear", GGUFValueType.STRING),
        "llama.rope.scaling.factor": (2.0, GGUFValueType.FLOAT32),
    }
    tiny_gguf(meta=meta).write(tmp_path / "x.gguf")
    found = config_of(tmp_path / "x.gguf").rope_parameters
    assert found == {"rope_type": "linear", "rope_theta": 100000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "key, value, kind, message",
    [
        ("llama.rope.scaling.type", "yarn", GGUFValueType.STRING, "scaling.factor"),
        ("llama.rope.dimension_count", 8, GGUFValueType.UINT32, "part of each head"),
    ],
)
def test_unknown_ropes_are_refused(tiny_gguf, tmp_path, key, value, kind, message):
    tiny_gguf(meta={key: (value, kind)}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=message):
        config_of(tmp_path / "x.gguf")
