from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune.model.blocks import blocks


def test_blocks_of_a_model_are_its_layers():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    assert list(blocks(model)) == list(model.model.layers)


def test_blocks_within_blocks_are_run_with_them():
    outer = GradientCheckpointingLayer()
    outer.inner = GradientCheckpointingLayer()
    assert list(blocks(nn.Sequential(nn.Sequential(outer), nn.Linear(1, 1)))) == [outer]
