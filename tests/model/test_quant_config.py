"""The recipe's words, config.json and the storage of every layer."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from qtune.errors import UserError
from qtune.model.quant_config import QtuneConfig
from qtune.quant.storage import Storage
from qtune.recipe import Quant

LAYERS = {"down_proj": {"format": "int2"}, "layers.1": {"format": "int8"}}


def test_plain_recipe() -> None:
    config = QtuneConfig.of(Quant())
    assert config.storage("model.layers.0.mlp.up_proj") == Storage()
    assert config.skip == ["lm_head"]


def test_every_word_of_a_recipe_reaches_the_layers() -> None:
    layers = {"q_proj": "int8"}
    quant = Quant(format="int4", group_size=32, method="gptq", rotate=True, layers=layers)
    config = QtuneConfig.of(quant)
    assert config.storage("a.o_proj") == Storage("int4", 32, rotated=True)
    assert config.storage("a.q_proj") == Storage("int8", 32, rotated=True)
    assert QtuneConfig.of(Quant(method="awq")).storage("a") == Storage(channels=True)
    in_integers = QtuneConfig.of(Quant(format="int8", activations="int8", outliers=3.0))
    assert in_integers.storage("a") == Storage("int8", activations="int8", outliers=3.0)


def test_longest_name_counts_and_only_whole_parts_of_it() -> None:
    config = QtuneConfig(layers=LAYERS | {"layers.1.mlp.down_proj": {"group_size": 128}})
    formats = {
        "model.layers.0.mlp.down_proj": "int2",
        "model.layers.1.mlp.up_proj": "int8",
        "model.layers.11.mlp.up_proj": "nf4",
        "model.layers.0.mlp.down_proj_2": "nf4",
    }
    assert {name: config.storage(name).format for name in formats} == formats
    assert config.storage("model.layers.1.mlp.down_proj") == Storage(group_size=128)


def test_experts_are_neither_rotated_nor_scaled() -> None:
    config = QtuneConfig("int4", rotate=True, channels=True, layers=LAYERS)
    assert config.expert_storage("layers.0.experts.gate_up_proj") == Storage("int4")
    assert config.expert_storage("layers.0.experts.down_proj") == Storage("int2")


def test_config_json_says_it_all(tmp_path: Path) -> None:
    config = QtuneConfig(
        "int4", "row", ["a"], rotate=True, scales="half", zeros="float", layers=LAYERS
    )
    LlamaConfig(quantization_config=config.to_dict()).save_pretrained(tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path).quantization_config
    again = QtuneConfig(**stored)
    names = "layers.0.up_proj", "layers.0.down_proj", "layers.1.up_proj"
    assert [again.storage(n) for n in names] == [config.storage(n) for n in names]
    assert again.to_dict() == config.to_dict() == json.loads(json.dumps(stored))


def test_a_changed_layer_keeps_what_it_had_of_its_own() -> None:
    config = QtuneConfig("int4", channels=True, layers={"o_proj": {"format": "nf4"}})
    config.change("layers.0.o_proj", channels=False)
    assert config.storage("layers.0.o_proj") == Storage("nf4", channels=False)
    assert config.storage("layers.1.o_proj") == Storage("nf4", channels=True)
    assert config.layers["o_proj"] == {"format": "nf4"}


def test_folders_of_before_still_load() -> None:
    config = QtuneConfig(quant_method="qtune", format="int8", group_size=32, skip=["lm_head"])
    assert config.storage("a") == Storage("int8", 32)


@pytest.mark.parametrize("size", [0, 8, 48, 100, -64])
def test_group_size_that_groups_cannot_have(size: int) -> None:
    with pytest.raises(UserError, match=rf"group_size \({size}\) must be a power of two"):
        QtuneConfig(group_size=size)


def test_unknown_format() -> None:
    with pytest.raises(UserError, match="unknown format 'nf5'"):
        QtuneConfig(format="nf5")
    with pytest.raises(UserError, match="unknown format 'nf5'"):
        QtuneConfig(layers={"q_proj": {"format": "nf5"}})
