import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2MoeConfig

from qtune.model.load import register
from qtune.planning.depth import blocks_are_alike, by_depth
from qtune.planning.sizes import base_on_meta
from qtune.recipe import Quant

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
ALIKE = LlamaConfig(**SIZES, num_hidden_layers=7)
# every other block has a sliding window, and the first has no experts
DIFFERING = [
    Gemma2Config(**SIZES, head_dim=16, num_hidden_layers=6),
    Qwen2MoeConfig(**SIZES, num_hidden_layers=4, mlp_only_layers=[0], num_experts=4),
]


@pytest.fixture(autouse=True)
def registered():
    register()


def alike(config):
    return blocks_are_alike(base_on_meta(config, Quant(format=None)), config)


def test_blocks_are_told_apart():
    assert alike(ALIKE) and alike(MistralConfig(**SIZES, num_hidden_layers=4))
    assert [alike(config) for config in DIFFERING] == [False, False]


def measured(config):
    """Something of the model, and what does not grow with it."""
    depth = config.num_hidden_layers
    return {"blocks": 100 * depth + 7, "head": 50}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 80])
def test_shallow_models_tell_of_deep_ones(depth):
    config = LlamaConfig(**SIZES, num_hidden_layers=depth)
    seen = []

    def measure(config):
        seen.append(config.num_hidden_layers)
        return measured(config)

    assert by_depth(config, True, measure) == measured(config)
    assert max(seen) <= 3 and config.num_hidden_layers == depth
    assert by_depth(config, False, measure) == measured(config) and seen[-1] == depth
    assert by_depth(config, True, lambda config: None) is None


def test_a_shallow_model_keeps_the_kinds_of_its_blocks():
    config = MistralConfig(**SIZES, num_hidden_layers=8)
    config.layer_types = ["full_attention"] * 8

    def parameters(config):
        assert len(config.layer_types) == config.num_hidden_layers
        model = base_on_meta(config, Quant(format=None))
        return {"all": sum(p.numel() for p in model.parameters())}

    with torch.device("meta"):
        assert by_depth(config, True, parameters) == parameters(config)
