from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qtune.errors import UserError
from qtune.model.load import register
from qtune.planning.candidates import best, candidates, form, undominated
from qtune.planning.footprint import Footprint, Request
from qtune.quant.format import load_format
from qtune.sensing.sensitivity import Header, SenseFile, Sensitivity

# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
HEADER = Header("small", "gptq", True, 64, "x.txt", "ab12", 2048, 3.25)
ASKED = Request(memory_bytes=2**40, context=64, serve=True, device=torch.device("cpu"))
FORMATS = ("int8", "int4", "int3", "int2")


@pytest.fixture(autouse=True)
def registered():
    register()


def footprint(name="small", width=64, layers=4):
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return Footprint(name, config)


def measured(model, formats=FORMATS):
    """Layers that lose the more the later they come, a quarter for each bit more."""
    found = [
        Sensitivity(layer, name, num, 0, 0.01, loss(place, num, name), 0.1)
        for place, (layer, (num, _)) in enumerate(model.sizes(form("int4")).layers.items())
        for name in formats
    ]
    return SenseFile(Path("sense.jsonl"), HEADER, found)


def loss(place, num_weights, name):
    return (1 + 10 * place) * num_weights / 4.0 ** bits(name)


def bits(name):
    return load_format(name).bits


def test_forms_come_with_the_method_that_suits_them():
    assert form(None).format is None
    for name in ("nf4", "int8"):
        assert (form(name).method, form(name).rotate) == ("nearest", False)
    assert (form("int3").method, form("int3").rotate) == ("gptq", True)
    assert (form("e8p").method, form("e8p").rotate) == ("gptq", False)


def test_a_small_model_is_not_proposed_in_two_bits():
    assert {it.name for it in candidates([footprint()], ASKED)} == {
        *("16-bit", "int8", "nf4", "int4", "int3")
    }
    assert [it.name for it in candidates([footprint()], ASKED, ["int2"])] == ["int2"]


def test_a_larger_model_in_four_bits_is_before_a_smaller_one_in_eight():
    models = [footprint("small", 512), footprint("large", 1024)]
    found = candidates(models, ASKED, ["int8", "int4"])
    order = [(it.footprint.name, it.name) for it in found]
    assert order.index(("large", "int4")) < order.index(("small", "int8"))
    ranks = [it.rank for it in found]
    assert ranks == sorted(ranks)


def test_the_best_one_that_fits_is_taken():
    found = candidates([footprint()], ASKED, ["int8", "int4", "int3"])
    sizes = {it.name: it.need.total for it in found}
    for name in sizes:
        chosen = best(found, replace(ASKED, memory_bytes=sizes[name]))
        assert chosen is not None and chosen.name == name
    assert best(found, replace(ASKED, memory_bytes=sizes["int3"] - 1)) is None
    # each is smaller than all that are better
    assert undominated(found) == {0, 1, 2}
    assert undominated([found[2], found[0], found[1]]) == {0}


def test_bits_have_a_budget():
    model = footprint()
    found = candidates([model], ASKED, FORMATS, bits_budget=4.5)
    assert [it.name for it in found] == ["int4", "int3", "int2"]
    least = found[-1].sizes.bits
    with pytest.raises(UserError, match=rf"fewest bits .* are {least:.2f} a weight"):
        candidates([model], ASKED, FORMATS, bits_budget=1.5)


def test_measured_losses_stand_in_for_expected_ones():
    model = footprint()
    sense = measured(model)
    found = {it.name: it for it in candidates([model], ASKED, FORMATS, sense=sense)}
    assert all(it.measured for it in found.values())
    layers = [it for it in sense.found if it.format == "int3"]
    assert found["int3"].lost == pytest.approx(sum(it.divergence for it in layers))
    # they were measured with one method, which is that of each form
    assert {(it.quant.method, it.quant.rotate) for it in found.values()} == {("gptq", True)}
    # with room for it, all layers get the most bits, and nothing is mixed
    assert set(found) == set(FORMATS)


@pytest.mark.parametrize("budget", [2.4, 3.2, 4.0])
def test_formats_are_chosen_layer_by_layer(budget):
    model = footprint()
    sense = measured(model)
    found = candidates([model], ASKED, FORMATS, budget, sense)
    mixed = found[0]
    assert mixed.name == "mixed" and mixed.quant.method == "gptq" and mixed.quant.rotate
    assert budget - 0.15 < mixed.sizes.bits <= budget
    uniform = [it for it in found if it.name != "mixed"]
    assert all(mixed.lost < it.lost for it in uniform)
    # what loses most gets most bits
    layers = list(mixed.sizes.layers)
    given = [bits(mixed.quant.layers.get(n, mixed.quant.format)) for n in layers]
    assert sum(given[:8]) < sum(given[-8:])


def test_the_mixture_fills_the_memory_that_there_is():
    model = footprint()
    usual = {it.name: it for it in candidates([model], ASKED, FORMATS)}
    between = (usual["int3"].need.total + usual["int4"].need.total) // 2
    asked = replace(ASKED, memory_bytes=between)
    mixed = best(candidates([model], asked, FORMATS, sense=measured(model)), asked)
    assert mixed is not None and mixed.name == "mixed"
    assert 0.98 * between < mixed.need.total <= between


def test_losses_that_are_no_numbers_are_never_taken():
    model = footprint()
    sense = measured(model)
    sense.found = [
        replace(it, divergence=float("nan")) if it.format == "int2" else it for it in sense.found
    ]
    mixed = candidates([model], ASKED, FORMATS, 3.4, sense)[0]
    assert "int2" not in {mixed.quant.format, *mixed.quant.layers.values()}


def test_measurements_of_another_model_are_refused():
    other = footprint(layers=3)
    with pytest.raises(UserError, match="measures layers of small, which are not those of other"):
        candidates([replace_name(other, "other")], ASKED, FORMATS, sense=measured(footprint()))


def replace_name(model, name):
    model.name = name
    return model
