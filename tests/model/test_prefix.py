from contextlib import suppress

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.model.blocks import blocks
from qtune.model.calibration.hessian import Enough
from qtune.model.prefix import left_out, stopping_behind


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_rest_of_the_model_gives_the_same_bits(model, first):
    ids, parts = torch.randint(0, 64, (1, 9)), list(blocks(model))
    whole = model(ids).logits
    with stopping_behind(parts[first - 1]) as found, suppress(Enough):
        model(ids)
    parts[0].self_attn.forward = None
    with left_out(parts[:first], found[0]):
        assert torch.equal(model(ids).logits, whole)


@torch.no_grad()
def test_afterwards_all_blocks_compute_again(model):
    ids, parts = torch.randint(0, 64, (1, 9)), list(blocks(model))
    # as somebody may have put there
    own = parts[1].forward
    parts[1].forward = own
    whole = model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), left_out(parts[:2], torch.zeros(1, 9, 32)):
        assert not torch.equal(model(ids).logits, whole)
        raise RuntimeError("stop")
    assert torch.equal(model(ids).logits, whole)
    assert "forward" not in vars(parts[0]) and vars(parts[1])["forward"] is own


@torch.no_grad()
def test_blocks_behind_do_not_run(model):
    ids, parts = torch.randint(0, 64, (1, 9)), list(blocks(model))
    ran = []
    for number, part in enumerate(parts):
        part.register_forward_pre_hook(lambda *given, number=number: ran.append(number))
    with stopping_behind(parts[1]) as found:
        for _ in range(2):
            with pytest.raises(Enough):
                model(ids)
    assert ran == [0, 1, 0, 1] and len(found) == 2
    model(ids)
    assert ran[4:] == [0, 1, 2, 3] and len(found) == 2
