import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from qtune.live_bytes import LiveBytes
from qtune.meta_mode import as_on
from qtune.model import attention
from qtune.train import recompute

CPU = torch.device("cpu")


@pytest.fixture
def qkv():
    return [torch.empty(1, 4, 512, 16, device="meta", requires_grad=True) for _ in range(3)]


def kept_of(qkv):
    with LiveBytes(qkv) as live:
        y = scaled_dot_product_attention(*qkv, is_causal=True)
        assert y.shape == qkv[0].shape
        return live.now


def test_attention_keeps_no_square_matrix(qkv):
    square = 4 * 512 * 512 * 4
    assert kept_of(qkv) >= square
    with as_on(CPU, torch.nn.Module()):
        assert kept_of(qkv) < square / 4


def test_questions_about_numbers_are_answered_on_meta_only():
    with as_on(CPU, torch.nn.Module()):
        assert torch.empty(3, device="meta").eq(0).all()
        assert not torch.ones(3).eq(0).all()
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.empty(3, device="meta").eq(0).all())


def test_meta_tensors_stand_for_those_of_the_device():
    tensor = torch.empty(1, device="meta")
    with as_on(torch.device("cuda"), torch.nn.Module()):
        assert attention._device_type(tensor) == "cuda"
    assert attention._device_type(tensor) == "meta"


def test_what_is_made_again_is_made_the_same_way(qkv):
    class Block(GradientCheckpointingLayer):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    model = torch.nn.ModuleList([Block()]).train()
    recompute.use(model, "all")
    square = 4 * 512 * 512 * 4
    with as_on(CPU, model), LiveBytes(qkv) as live:
        model[0](*qkv).sum().backward()
        assert live.peak < square / 2
