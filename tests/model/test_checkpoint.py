"""Reading folders tensor by tensor, and names in folders against names in models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qtune.model.checkpoint import (
    Names,
    bare_name,
    stored_dtype,
    stored_names,
    stored_tensor,
    stored_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture(params=["one file", "shards"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        places = {name: f"model-{name}.safetensors" for name in TENSORS}
        for name, file in places.items():
            save_file({name: TENSORS[name]}, tmp_path / file)
        index = {"weight_map": places}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_every_tensor_comes_as_it_is_stored(folder: Path) -> None:
    found = dict(stored_tensors(folder))
    assert found.keys() == TENSORS.keys()
    for name, path in stored_names(folder).items():
        assert found[name].dtype == TENSORS[name].dtype
        assert torch.equal(found[name], TENSORS[name])
        assert torch.equal(stored_tensor(path, name), TENSORS[name])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_dtype_is_that_of_the_config_or_of_the_first_tensor(
    tmp_path: Path, config: dict[str, str], expected: torch.dtype
) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path) == expected


def test_names_of_a_model() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    names = Names.of(AutoModelForCausalLM.from_config(config))
    assert names.in_model("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert names.in_model("model.norm.weight") == "model.norm.weight"
    assert names.in_model("something.else") == "something.else"
    tied = ["model.embed_tokens.weight", "lm_head.weight"]
    assert names.group("lm_head.weight") == names.group(tied[0]) == tied
    assert names.group("model.norm.weight") == ["model.norm.weight"]


def test_wrappers_of_peft_are_no_part_of_a_name() -> None:
    assert bare_name("model.q_proj.base_layer.weight") == "model.q_proj.weight"
    assert bare_name("lm_head.original_module.weight") == "lm_head.weight"
