from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from qtune.errors import UserError
from qtune.model.load import load_base
from qtune.sensing.layer_losses import LayerLosses

ROWS = [[5, 9, 3, 77, 200, 41, 8], [300, 2, 2, 19, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
CPU = torch.device("cpu")


@pytest.fixture
def losses(tiny_model):
    return LayerLosses(load_base(tiny_model, None, device=CPU, dtype=torch.float32), ROWS)


def truth(folder, changes=None):
    """The mean loss of a token, by transformers alone, with other weights put in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, weight in (changes or {}).items():
        model.get_submodule(name).weight.data = weight.double()
    total = num = 0
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row])
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            num += len(row) - 1
    return total / num


def test_the_loss_is_that_of_the_whole_model(losses, tiny_model):
    assert losses.loss == pytest.approx(truth(tiny_model), abs=1e-6)
    assert [row.weight for row in losses.dense] == [6, 4, 8]
    assert losses.num_blocks == 2


def test_changes_are_those_of_the_whole_model(losses, tiny_model):
    """Also in the last block, where everything before it is left out."""
    torch.manual_seed(1)
    seen = []
    for block in losses:
        for name in list(block.layers)[::3]:
            weight = block.layers[name].weight
            other = weight + torch.randn_like(weight)
            found = block.loss_change(name, other)
            expected = truth(tiny_model, {name: other}) - truth(tiny_model)
            assert found.nats == pytest.approx(expected, abs=2e-6), name
            assert found.standard_error > 0 and found.num_samples == 3
            assert block.loss_change(name, weight).nats == 0
            seen.append(name)
    assert {name.split(".")[2] for name in seen} == {"0", "1"}


def test_hessians_are_the_mean_of_what_layers_are_given(losses, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    given = {}

    def hook(name):
        return lambda layer, args: given.setdefault(name, []).append(args[0][0])

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    found = {name: h for block in losses for name, h in block.hessians().items()}
    assert set(found) == set(given) - {"lm_head"} and len(found) == 14
    for name, hessian in found.items():
        x = torch.cat(given[name])
        assert torch.allclose(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_that_it_is_not_for_are_refused(tmp_path: Path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4}
    config = Qwen2MoeConfig(**sizes, **heads, moe_intermediate_size=32, intermediate_size=32)
    with pytest.raises(UserError, match="mixture of experts"):
        LayerLosses(Qwen2MoeForCausalLM(config), ROWS)
    other = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=0, n_head=2, vocab_size=512))
    with pytest.raises(UserError, match="BloomForCausalLM has no blocks"):
        LayerLosses(other, ROWS)
