from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtune.errors import UserError
from qtune.export.gguf_file.rope import add_rope, rope_tensors
from qtune.export.gguf_file.write import opened

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def metadata(config: Any, folder: Path) -> dict[str, Any]:
    with opened(folder / "x.gguf", "llama") as writer:
        add_rope(writer, config)
    fields = GGUFReader(folder / "x.gguf").fields
    names = [name for name in fields if name.startswith("llama.rope")]
    return {name.removeprefix("llama.rope."): fields[name].contents() for name in names}


def test_factors_of_llama3_are_those_of_transformers() -> None:
    config = LlamaConfig(head_dim=64, rope_parameters=LLAMA3)
    ((name, factors),) = rope_tensors(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert name == "rope_freqs.weight" and factors.dtype == torch.float32
    assert torch.allclose(plain / factors, scaled, rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == 8


def test_base_and_dimensions(tmp_path: Path) -> None:
    found = metadata(LlamaConfig(head_dim=64, rope_parameters=LLAMA3), tmp_path)
    assert found == {"dimension_count": 64, "freq_base": 500000.0}


def test_scalings(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    found = metadata(LlamaConfig(rope_parameters=rope), tmp_path)
    assert found["scaling.type"] == "linear" and found["scaling.factor"] == 4
    rope |= {"rope_type": "yarn", "original_max_position_embeddings": 64, "beta_fast": 16}
    found = metadata(LlamaConfig(rope_parameters=rope), tmp_path)
    assert found["scaling.type"] == "yarn" and found["scaling.original_context_length"] == 64
    assert found["scaling.yarn_beta_fast"] == 16


def test_long_contexts_of_phi(tmp_path: Path) -> None:
    config = Phi3Config(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 16,
            "long_factor": [3.0] * 16,
        },
    )  # fmt: skip
    found = metadata(config, tmp_path)
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=9)
    assert found["scaling.attn_factor"] == pytest.approx(expected)
    assert found["scaling.original_context_length"] == 4096
    tensors = {name: values.tolist() for name, values in rope_tensors(config)}
    assert tensors["rope_factors_long.weight"] == [3.0] * 16
    assert tensors["rope_factors_short.weight"] == [1.5] * 16


def test_what_llamacpp_has_not_is_refused(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="no rope scaling of the type dynamic"):
        metadata(LlamaConfig(rope_parameters=dynamic), tmp_path)
    plain = {"rope_type": "default", "rope_theta": 1e6}
    rope = {"full_attention": plain, "sliding_attention": plain}
    with pytest.raises(UserError, match="rope_theta 10000 without scaling in the windows"):
        metadata(Gemma3TextConfig(rope_parameters=rope), tmp_path)
