import random
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import LlamaConfig

from qtune import recipe_yaml
from qtune.model.load import register
from qtune.model.quant_config import QtuneConfig
from qtune.planning.candidates import candidates
from qtune.planning.footprint import Footprint, Request
from qtune.planning.fragment import fragment, shortened
from qtune.recipe import Quant

# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
REST = """
data: {train: rows.jsonl}
train: {steps: 10}
run: out
"""


@pytest.fixture(scope="module")
def model():
    register()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Footprint("org/small", LlamaConfig(**sizes, **heads, vocab_size=512))


def candidate(model, request, name):
    (found,) = candidates([model], request, [name])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_shortened_entries_give_every_layer_its_format(model, seed):
    draw = random.Random(seed)
    names = list(model.sizes(Quant()).layers)
    formats = {name: draw.choice(["int4", "int3", "int2"]) for name in names}
    formats |= {name: "int4" for name in names if "down_proj" in name}
    entries = shortened(formats, "int3")
    assert len(entries) < len(formats)
    config = QtuneConfig.of(Quant(format="int3", layers=entries))
    assert {name: config.storage(name).format for name in names} == formats
    assert shortened(dict.fromkeys(names, "int3"), "int3") == {}


def test_a_recipe_takes_the_lines(model, tmp_path):
    request = Request(2**40, 64, batch=3, rank=8, device=torch.device("cpu"))
    found = candidate(model, request, "int3")
    names = list(found.sizes.layers)
    mixed = replace(found, quant=replace(found.quant, layers={names[3]: "int4"}))
    text = fragment(mixed, request)
    made, rest = yaml.safe_load(text), yaml.safe_load(REST)
    whole = {**made, **rest, **{key: made[key] | rest[key] for key in made.keys() & rest.keys()}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(whole))
    recipe = recipe_yaml.load(tmp_path / "r.yaml")
    assert recipe.model == "org/small" and recipe.quant == mixed.quant
    assert (recipe.lora.rank, recipe.lora.init) == (8, "cloq")
    assert (recipe.train.micro_batch_tokens, recipe.data.max_length) == (192, 64)


def test_for_use_it_is_the_model_alone(model):
    request = Request(2**40, 64, serve=True, device=torch.device("cpu"))
    found = yaml.safe_load(fragment(candidate(model, request, "int8"), request))
    assert found == {"model": "org/small", "quant": {"format": "int8", "group_size": 64}}
    dense = candidates([model], request)[0]
    assert yaml.safe_load(fragment(dense, request))["quant"] == {"format": None}
