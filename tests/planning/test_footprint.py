from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, DynamicCache, LlamaConfig

from qtune.data.sample import Sample
from qtune.memory import training_memory
from qtune.model.kv_cache import cache_bytes, packed_cache
from qtune.model.load import add_adapter, load_base, register
from qtune.planning import footprint as module
from qtune.planning.footprint import Footprint, Request
from qtune.planning.sizes import base_on_meta
from qtune.recipe import Lora, Quant

CPU = torch.device("cpu")
# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
MUCH = 2**40
DEEP = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


@pytest.fixture(autouse=True)
def registered():
    register()


def request(**fields):
    return replace(Request(memory_bytes=MUCH, context=160, batch=2, device=CPU), **fields)


@pytest.mark.parametrize(("policy", "free"), [("none", MUCH), ("all", 1)])
@pytest.mark.parametrize("quant", [Quant(format=None), Quant(format="int8")], ids=["bf16", "int8"])
def test_training_takes_what_the_plan_of_a_run_says(tiny_recipe, policy, free, quant):
    """`training_memory` is held against the allocator in its own test."""
    found = Footprint("x", DEEP).need(quant, request(memory_bytes=free))
    # the last policy is taken where none fits
    assert found.policy == policy

    recipe = tiny_recipe(quant={"format": quant.format}, lora={"rank": 16})
    model = add_adapter(base_on_meta(DEEP, quant), Lora(rank=16))
    sample = Sample("", [0] * 160, [0.0] + [1.0] * 159, label=True)
    whole = training_memory(model, [sample] * 2, CPU, policy, recipe)
    parts = {name: size for name, size in asdict(whole).items() if size}
    assert found.parts == pytest.approx(parts, rel=0.002)


@pytest.mark.parametrize("kv_bits", [16, 8, 4, 2])
def test_serving_takes_what_is_measured(tiny_model, kv_bits):
    quant = Quant(format="int4")
    made = Footprint("x", AutoConfig.from_pretrained(tiny_model))
    planned = made.need(quant, request(context=448, serve=True, kv_bits=kv_bits))
    model = load_base(Path(tiny_model), quant, device=CPU).eval()
    assert planned.parts["weights"] == sum(p.nbytes for p in model.parameters())

    ids = torch.randint(3, 500, (2, 448))
    empty = DynamicCache(config=model.config)
    past = empty if kv_bits == 16 else packed_cache(model.config, kv_bits)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    assert planned.parts["kv_cache"] == cache_bytes(past)
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in changes))
    parts = planned.parts["kv_cache"] + planned.parts["workspace"]
    # kernels take scratch memory of their own, for which `temporary` is meant
    assert parts * 0.95 <= peak <= (parts + planned.parts["temporary"]) * 1.05


def test_keys_and_values_are_of_all_layers_heads_and_tokens():
    made = Footprint("x", DEEP)
    found = made.need(Quant(), request(serve=True))
    # two of them, 6 layers, 2 heads of 16, 2 rows of 160 tokens, two bytes each
    assert found.parts["kv_cache"] == 2 * 6 * 2 * 16 * 2 * 160 * 2
    packed = made.need(Quant(), request(serve=True, context=1120, kv_bits=2))
    # keys in 2 + 32 / 32 bits, values in 2 + 32 / 16, and the last 128 tokens as they are
    assert packed.parts["kv_cache"] == 6 * 2 * 2 * 16 * (992 * (3 + 4) // 8 + 2 * 128 * 2)


def test_weights_follow_the_form_and_all_else_does_not(monkeypatch):
    runs = []
    real = module.training_memory
    monkeypatch.setattr(module, "training_memory", lambda *a: runs.append(a) or real(*a))
    made = Footprint("/models/some/llama/", DEEP)
    assert made.label == "llama" and made.num_parameters == 6 * 36992 + 2 * 512 * 64 + 64
    forms = [Quant(), Quant(format="int8"), Quant(layers={"q_proj": "int8"})]
    needs = [made.need(quant, request()).parts for quant in forms]
    # two depths, with and without recomputation
    assert len(runs) == 4
    assert needs[0]["weights"] < needs[2]["weights"] < needs[1]["weights"]
    assert {**needs[0], "weights": 0} == {**needs[1], "weights": 0}
