"""Blocks run one after the other, with what was noted, are the model."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qtune.errors import UserError
from qtune.model.calibration.trace import trace


def ready(name):
    return nullcontext()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "phi3"])
def test_blocks_one_by_one_give_what_the_model_gives(make_model, read, rows, family):
    model = read(make_model(family))
    with torch.no_grad():
        found = trace(model, rows, ready)
        for i, row in enumerate(rows):
            hidden = found.hidden[i]
            for name in found.names:
                hidden = found.calls[name][i].run(model.get_submodule(name), hidden)
            norm = getattr(model.base_model, "norm", None) or model.base_model.final_layer_norm
            expected = model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state
            torch.testing.assert_close(norm(hidden), expected, rtol=1e-5, atol=1e-5)
    assert len(found.names) == 2


def test_blocks_that_return_more_than_hidden_states(make_model, read, rows, monkeypatch):
    model = read(make_model())
    block_class = type(model.model.layers[0])
    plain = block_class.forward
    monkeypatch.setattr(block_class, "forward", lambda *a, **k: (plain(*a, **k), "weights"))
    # as models do whose blocks return more
    monkeypatch.setattr(block_class, "__call__", lambda *a, **k: nn.Module.__call__(*a, **k)[0])
    with torch.no_grad():
        found = trace(model, rows, ready)
        after = found.calls[found.names[0]][0].run(model.model.layers[0].forward, found.hidden[0])
    assert after.shape == found.hidden[0].shape == (1, 24, 64)


def test_model_is_as_it_was(make_model, read, rows):
    model = read(make_model())
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        before = model(ids).logits
        trace(model, rows, ready)
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_block_that_runs_twice_is_refused(make_model, read, rows):
    model = read(make_model())
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 2)
    with torch.no_grad(), pytest.raises(UserError, match="one after the other, each once"):
        trace(model, rows, ready)


def test_model_without_blocks_is_refused(make_model, read, rows):
    model = read(make_model())
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="not made of blocks"):
        trace(model, rows, ready)
