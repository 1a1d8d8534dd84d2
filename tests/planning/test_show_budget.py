import pytest
import torch
from transformers import LlamaConfig

from qtune.model.load import register
from qtune.planning import show_budget
from qtune.planning.budget import find
from qtune.planning.footprint import Footprint, Request
from qtune.recipe import Quant


@pytest.fixture(scope="module")
def model():
    register()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Footprint("/some/small", LlamaConfig(**sizes, **heads, vocab_size=512))


def shown(model, memory_bytes, capsys):
    request = Request(memory_bytes, 512, serve=True, device=torch.device("cpu"))
    found = find([model], request, ["int8", "nf4"])
    show_budget.budget(found, "quant: {}\n")
    return found, capsys.readouterr().out


def test_every_form_has_a_line_with_its_bits(model, capsys):
    found, text = shown(model, 2**40, capsys)
    lines = [line for line in text.splitlines() if line.startswith("small ")]
    assert [line.split()[1] for line in lines] == ["int8", "nf4"]
    for line, candidate in zip(lines, found.candidates, strict=True):
        assert f"{candidate.sizes.bits:.2f}" in line and "*" in line
        # nobody has measured this model
        assert f"{candidate.lost:+.3f}?" in line
    assert "for the recipe" in text and "quant: {}" in text and "better" not in text


def test_what_does_not_fit_is_marked_and_what_would_help_is_said(model, capsys):
    request = Request(2**40, 512, serve=True, device=torch.device("cpu"))
    size = model.need(Quant(format="int8"), request).total - 1
    _, text = shown(model, size, capsys)
    assert text.count("too large") == 1
    assert "small as int8 needs" in text and "it fits with --kv-bits 8" in text
