"""Attention by the fused rotation against attention as transformers has it."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmConfig, GPTNeoXConfig, LlamaConfig
from transformers.models.llama import modeling_llama

from qtune.model import fused_rotation
from qtune.model.fused_rotation import fuse_rotation

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TOKENS = torch.arange(20).view(2, 10) * 3


def make(config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | settings)).eval()


def attention(model: Any) -> torch.nn.Module:
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of q in the calls of the op."""
    seen, op = [], fused_rotation.rope

    def counted(q: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append(q.shape)
        return op(q, *rest)

    monkeypatch.setattr(fused_rotation, "rope", counted)
    return seen


def test_logits_are_the_same_and_come_by_the_op(calls) -> None:
    model = make(LlamaConfig)
    plain = model(input_ids=TOKENS).logits
    assert fuse_rotation(attention(model)) and not fuse_rotation(attention(model))
    calls.clear()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, plain)
    assert calls == [(2, 4, 10, 8)]


def test_the_class_and_its_module_stay_as_they_are() -> None:
    model = make(LlamaConfig)
    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    fuse_rotation(attention(model))
    after = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    assert after == before
    assert isinstance(attention(model), modeling_llama.LlamaAttention)


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    model = make(LlamaConfig)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    plain = model.generate(TOKENS, **options)
    fuse_rotation(attention(model))
    assert torch.equal(model.generate(TOKENS, **options), plain)


def test_a_rotation_of_neighbours_is_left_alone() -> None:
    model = make(GlmConfig, num_key_value_heads=2, head_dim=8)
    assert not fuse_rotation(attention(model))


def test_heads_that_turn_in_part_keep_their_own_function(calls) -> None:
    model = make(GPTNeoXConfig, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    plain = model(input_ids=TOKENS).logits
    fuse_rotation(attention(model))
    calls.clear()
    assert torch.equal(model(input_ids=TOKENS).logits, plain) and calls == []


def test_float32_angles_keep_the_dtype_they_gave(calls) -> None:
    rotate = fused_rotation._by_op(modeling_llama.apply_rotary_pos_emb)
    q = torch.randn(1, 2, 5, 8).bfloat16()
    cos, sin = torch.randn(2, 1, 5, 8)
    assert [one.dtype for one in rotate(q, q, cos, sin)] == [torch.float32] * 2
    assert rotate(q, q, cos.bfloat16(), sin.bfloat16())[0].dtype == torch.bfloat16
    assert calls == [q.shape]


def test_other_layouts_are_asked_of_the_original(calls) -> None:
    rotate = fused_rotation._by_op(modeling_llama.apply_rotary_pos_emb)
    q, (cos, sin) = torch.randn(1, 5, 2, 8), torch.randn(2, 1, 5, 8)
    expected = modeling_llama.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    assert torch.equal(rotate(q, q, cos, sin, unsqueeze_dim=2)[0], expected[0]) and calls == []


def test_modules_without_a_rotation_are_left_alone() -> None:
    assert not fuse_rotation(torch.nn.Linear(2, 2))
