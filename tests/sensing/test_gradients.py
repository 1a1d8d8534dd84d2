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
from qtune.sensing import gradients as module
from qtune.sensing.gradients import LayerGradients

ROWS = [[5, 9, 3, 77, 200, 41, 8], [300, 2, 2, 19, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model):
    return load_base(tiny_model, None, device=CPU, dtype=torch.float32)


def noted(folder, rows, targets):
    """What layers are given, and gradients by what they give, by transformers and hooks alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    given, gave = {}, {}

    def hook(name):
        def note(layer, args, output):
            output.retain_grad()
            given.setdefault(name, []).append(args[0][0].detach())
            gave.setdefault(name, []).append(output)

        return note

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_hook(hook(name))
    for row, wanted in zip(rows, targets, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        cross_entropy(logits, wanted, reduction="sum").backward()
    return given, {name: [it.grad[0] for it in outputs] for name, outputs in gave.items()}


def test_gradients_are_those_of_the_whole_model(model, tiny_model):
    """Also in the last block, where everything before it is left out."""
    found = LayerGradients(model, ROWS)
    given, gradients = noted(tiny_model, ROWS, found.targets)
    seen = {name: calls for block in found for name, calls in block.seen().items()}
    assert set(seen) == set(given) and len(seen) == 14
    for name, calls in seen.items():
        assert [call.row for call in calls] == [0, 1, 2]
        for call, x, g in zip(calls, given[name], gradients[name], strict=True):
            assert torch.allclose(call.given.double(), x, rtol=1e-4, atol=1e-5), name
            assert torch.allclose(call.gradient.double(), g, rtol=1e-3, atol=1e-6), name


def test_hessians_are_the_mean_of_what_layers_are_given(model, tiny_model, monkeypatch):
    """Over all rows, gradients being those of the first ones."""
    monkeypatch.setattr(module, "GRADIENT_TOKENS", 8)
    found = LayerGradients(model, ROWS)
    assert [len(row) for row in found.targets] == [6, 4]
    given, _ = noted(tiny_model, ROWS, [torch.tensor(row[1:]) for row in ROWS])
    hessians = {}
    for block in found:
        hessians |= block.hessians()
        assert {call.row for calls in block.seen().values() for call in calls} == {0, 1}
    assert set(hessians) == set(given)
    for name, hessian in hessians.items():
        x = torch.cat(given[name])
        assert torch.allclose(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6), name


def test_the_loss_is_that_of_the_text(model, tiny_model):
    truth = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    total = 0.0
    with torch.no_grad():
        for row in ROWS:
            logits = truth(input_ids=torch.tensor([row])).logits[0, :-1]
            total += float(cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
    # a row of one token predicts nothing
    assert LayerGradients(model, [*ROWS, [3]]).loss == pytest.approx(total / 18, abs=1e-5)


def test_targets_are_drawn_from_the_distributions():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(20000, 4)
    drawn = module.drawn(logits, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_that_it_is_not_for_are_refused(model):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4}
    config = Qwen2MoeConfig(**sizes, **heads, moe_intermediate_size=32, intermediate_size=32)
    with pytest.raises(UserError, match="mixture of experts"):
        LayerGradients(Qwen2MoeForCausalLM(config), ROWS)
    other = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=0, n_head=2, vocab_size=512))
    with pytest.raises(UserError, match="BloomForCausalLM has no blocks"):
        LayerGradients(other, ROWS)
    with pytest.raises(UserError, match="no two tokens"):
        LayerGradients(model, [[1], [2]])
