from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qtune.errors import UserError
from qtune.model.load import register
from qtune.planning.footprint import Footprint, Request
from qtune.planning.mixture import Measurements
from qtune.quant.format import load_format
from qtune.recipe import Quant
from qtune.sensing.sensitivity import Header, SenseFile, Sensitivity

HEADER = Header("small", "gptq", True, 64, "x.txt", "ab12", 2048, 3.25)
ASKED = Request(memory_bytes=2**40, context=64, serve=True, device=torch.device("cpu"))
FORMATS = ("int4", "int3", "int2")


@pytest.fixture(scope="module")
def model():
    register()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return Footprint("small", config)


def measured(model, formats=FORMATS):
    """Layers that lose the more the later they come, a quarter for each bit more."""
    layers = list(model.sizes(Quant(format="int4")).layers)
    found = [
        Sensitivity(layer, name, 1, 1, 0.01, (1 + place) / 4.0 ** load_format(name).bits, 0.1)
        for place, layer in enumerate(layers)
        for name in formats
    ]
    return SenseFile(Path("sense.jsonl"), HEADER, found)


def test_a_form_has_the_settings_of_the_measurement(model):
    found = Measurements(measured(model)).form("int3")
    assert found == Quant(format="int3", method="gptq", rotate=True, group_size=64)


def test_what_all_layers_lose_adds_up(model):
    sense = measured(model)
    found = Measurements(sense)
    expected = sum(it.divergence for it in sense.found if it.format == "int3")
    assert found.lost(model, "int3") == pytest.approx(expected)
    assert found.lost(model, "int8") is None
    sense.found = sense.found[:-1]
    assert Measurements(sense).lost(model, "int2") is None


def test_the_bytes_there_are_go_where_they_save_most(model):
    quant, lost = Measurements(measured(model)).mixture(model, ASKED, None, 3.2)
    sizes = model.sizes(quant)
    assert 3.0 < sizes.bits <= 3.2
    bits = [load_format(quant.layers.get(it, quant.format)).bits for it in sizes.layers]
    assert lost == pytest.approx(sum((1 + at) / 4.0**b for at, b in enumerate(bits)))
    # each change between two layers of one size that leaves the bytes as they are loses more
    shapes = [num for num, _ in sizes.layers.values()]
    for a in range(len(bits)):
        for b in range(a):
            assert shapes[a] != shapes[b] or bits[b] <= bits[a]


def test_what_overflowed_is_never_taken(model):
    sense = measured(model)
    sense.found = [
        replace(it, divergence=float("nan")) if it.format == "int2" else it for it in sense.found
    ]
    found = Measurements(sense).mixture(model, ASKED, None, 2.5)
    assert found is not None
    assert {found[0].format, *found[0].layers.values()} == {"int3"}


def test_there_is_no_mixture_of_what_was_not_measured(model):
    assert Measurements(measured(model)).mixture(model, ASKED, ["nf4"], 5.0) is None
    sense = measured(model)
    sense.found = sense.found[3:]
    assert Measurements(sense).mixture(model, ASKED) is None


def test_the_model_is_found_by_its_layers(model):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=512)
    other = Footprint("other", config)
    found = Measurements(measured(model))
    assert found.model_among([other, model]) is model
    with pytest.raises(UserError, match="measures layers of small, which are not those of other"):
        found.model_among([other])
