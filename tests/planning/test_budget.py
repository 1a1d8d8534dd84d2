from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from qtune.errors import UserError
from qtune.model.load import register
from qtune.planning.budget import find
from qtune.planning.footprint import Footprint, Request

# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
ASKED = Request(2**36, 256, batch=4, serve=True, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    register()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=2048,
    )
    return Footprint("/models/small", config)


def needed(model, **fields):
    """Bytes that int8 takes for the request with these changes."""
    found = find([model], replace(ASKED, **fields), ["int8"])
    return found.chosen.need.total


def in_memory(size, **fields):
    return replace(ASKED, memory_bytes=size, **fields)


def test_the_largest_batch_and_context_just_fit(model):
    found = find([model], in_memory(needed(model, batch=9)), ["int8"])
    assert found.most_rows == 9
    found = find([model], in_memory(needed(model, context=768)), ["int8"])
    assert found.most_context == 768
    # with much memory, what the model was made for
    assert find([model], ASKED, ["int8"]).most_context == 2048


def test_with_recomputation_more_fits_in_training(model):
    wanted = {"serve": False, "batch": 3, "context": 64}
    size = needed(model, **wanted)
    found = find([model], in_memory(size, **wanted), ["int8"])
    assert found.chosen.need.policy == "none" and found.most_rows > 3
    rows = {"serve": False, "context": 64, "batch": found.most_rows, "memory_bytes": size}
    assert 0.9 * size < needed(model, **rows) <= size


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"kv_bits": 8}, "--kv-bits 8"), ({"batch": 1}, "--batch 1"), ({"context": 128}, "--context")],
)
def test_nothing_fits_is_said_with_the_minimum_and_a_way(model, fields, words):
    batch = 1 if "context" in fields else 4
    size = needed(model, **{"batch": batch, **fields})
    with pytest.raises(UserError, match=rf"the least is .* for small as int8; {words}.* would fit"):
        find([model], in_memory(size, batch=batch), ["int8"])


def test_the_minimum_is_enough(model):
    least = needed(model)
    assert find([model], in_memory(least), ["int8"]).chosen.need.total == least
    with pytest.raises(UserError, match=r"hold none of these models for 4 x 256 tokens"):
        find([model], in_memory(least - 1), ["int8"])
    with pytest.raises(UserError, match=r"as int8; name a smaller model"):
        find([model], in_memory(1000), ["int8"])


def test_a_better_form_is_named_with_the_change_it_takes(model):
    found = find([model], in_memory(needed(model) - 1), ["int8", "nf4"])
    assert found.chosen.name == "nf4"
    assert found.wish is not None and found.wish.candidate.name == "int8"
    assert found.wish.change.words == "--kv-bits 8"
    assert find([model], ASKED, ["int8", "nf4"]).wish is None
