import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)

from qtune import plan
from qtune.data.chunk import NO_ROW
from qtune.data.feed import StoredFeed
from qtune.data.mix import Mix
from qtune.data.sample import Sample
from qtune.data.store import collected
from qtune.errors import UserError
from qtune.model.load import add_adapter, load_base, register
from qtune.plan import make_plan, matrix_flops_per_s, num_steps, plan_elsewhere, size_bytes
from qtune.train.optim import make_optimizer

CPU = torch.device("cpu")
# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")


@pytest.fixture(autouse=True)
def registered():
    register()


def feed(batch_size=4):
    """Twelve samples of 40 to 95 tokens."""
    lengths = range(40, 100, 5)
    made = collected((Sample("x", [5] * n, [1.0] * n, label=True), NO_ROW) for n in lengths)
    return StoredFeed(Mix([made], [None]), batch_size, 0)


def planned(recipe, **options):
    given = feed(recipe.train.batch_size)
    return make_plan(recipe, Path(recipe.model), given, CPU, **options)


@pytest.mark.parametrize("format_name", ["nf4", "int8", None])
@pytest.mark.parametrize("lora", [{}, {"dora": True, "target_modules": ("q_proj", "down_proj")}])
def test_bytes_are_those_of_the_loaded_model(tiny_recipe, format_name, lora):
    recipe = tiny_recipe(quant={"format": format_name}, lora=lora)
    made = planned(recipe)
    model = add_adapter(load_base(Path(recipe.model), recipe.quant, device=CPU), recipe.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert made.memory.weights == sum(p.nbytes for p in frozen)
    assert made.memory.adapter == made.memory.gradients == sum(p.nbytes for p in trained)
    assert made.num_trained == sum(p.numel() for p in trained)

    optimizer = make_optimizer(model, recipe.train)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert made.memory.optimizer == sum(t.nbytes for t in moments)


def test_layers_are_named_with_their_format(tiny_recipe):
    made = planned(tiny_recipe(quant={"skip": ("lm_head", "k_proj")}))
    layers = {layer.name: layer for layer in made.layers}
    assert len(layers) == 2 * 7 + 1
    q = layers["model.layers.0.self_attn.q_proj"]
    assert (q.format, q.shape) == ("nf4", (64, 64))
    # 4 bits each, a scale code per 64, one scale and offset of the scales
    assert q.size_bytes == 64 * 64 // 2 + 64 + 4 + 4
    assert layers["model.layers.1.self_attn.k_proj"].format == "bfloat16"
    assert layers["lm_head"].size_bytes == 512 * 64 * 2
    assert made.num_parameters == sum(o * i for o, i in (layer.shape for layer in made.layers))


def test_the_plan_is_json_with_a_total(tiny_recipe):
    made = planned(tiny_recipe())
    read = json.loads(json.dumps(made.to_json()))
    assert read["memory"]["total"] == made.memory.total > made.memory.activations > 0
    assert read["expected_minutes"] > 0 and read["steps"] == 4
    given = feed()
    tokens = [sample.num_tokens for step in range(4) for sample in given.batch(step)]
    assert read["tokens_per_step"] == sum(tokens) // 4
    assert read["matrix_flops_per_s"] > 1e8 and read["num_processes"] == 1
    assert read["layers"][0].keys() == {"name", "shape", "format", "size_bytes"}
    assert read["available_bytes"] > read["memory"]["total"]
    assert read["recompute"]["policy"] == "none"
    assert read["recompute"]["reason"] == "everything fits"
    assert read["recompute"]["total_bytes"]["none"] == read["memory"]["total"]


def test_what_is_made_again_follows_the_free_memory(tiny_recipe):
    sizes = planned(tiny_recipe()).recompute.total_bytes
    free = int(sizes["all"] / 0.89)
    made = planned(tiny_recipe(), free_bytes=free)
    assert (made.recompute.policy, made.available_bytes) == ("all", free)
    with pytest.raises(UserError, match=r"with train\.recompute: all the run needs"):
        planned(tiny_recipe(), free_bytes=sizes["all"] // 2)
    assert planned(tiny_recipe(), begun_with="cheap").recompute.policy == "cheap"


def test_processes_share_the_work_of_a_step(tiny_recipe):
    one, two = planned(tiny_recipe()), planned(tiny_recipe(), num_processes=2)
    assert two.memory.activations < one.memory.activations
    assert (two.steps, two.layers, two.num_processes) == (one.steps, one.layers, 2)
    assert two.memory.weights == one.memory.weights


def test_sharded_processes_share_the_parameters(tiny_recipe):
    one = planned(tiny_recipe(), num_processes=2)
    two = planned(tiny_recipe(train={"parallel": "fsdp"}), num_processes=2)
    assert two.memory.weights == one.memory.weights // 2 and two.memory.gathered
    # what is written is whole
    assert two.disk_bytes == one.disk_bytes


def test_a_reference_and_recomputation_take_time(tiny_recipe, monkeypatch):
    monkeypatch.setattr(plan, "matrix_flops_per_s", lambda device: 1e6)
    minutes = {
        name: planned(tiny_recipe(train=train)).expected_minutes
        for name, train in {
            "sft": {},
            "again": {"recompute": "all"},
            "kto": {"objective": "kto"},
        }.items()
    }
    assert minutes["again"] == minutes["kto"] == pytest.approx(1.5 * minutes["sft"])


def test_the_rate_is_measured_on_the_device():
    assert matrix_flops_per_s(CPU) > 1e8


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        (" 512 MiB ", 2**29),
        ("1.5gib", 3 * 2**29),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "24 apples", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="not a size; write it as 24GiB"):
        size_bytes(text)


def test_devices_elsewhere_need_a_configuration_only(tiny_recipe, tmp_path):
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    config.save_pretrained(tmp_path)
    recipe = tiny_recipe(export=("bf16",))
    made = plan_elsewhere(recipe, tmp_path, feed(), "24GiB")
    assert made.available_bytes == 24 * 2**30 >= made.memory.total
    # the layers in 4 bits and a little, embeddings and head in 16
    linear = sum(o * i for o, i in (layer.shape for layer in made.layers[:-1]))
    dense = 2 * 128256 * 4096 * 2
    assert made.memory.weights == pytest.approx(linear * 4.13 / 8 + dense, rel=0.002)
    assert made.matrix_flops_per_s is None and made.expected_minutes is None
    # the dense model twice for a while, though no weights are there
    assert made.disk_bytes > 2 * 2 * made.num_parameters
    with pytest.raises(UserError, match=r"5\.0 GiB are free; most goes to weights"):
        plan_elsewhere(recipe, tmp_path, feed(), "5GiB")
    sharded = tiny_recipe(train={"parallel": "fsdp"})
    assert plan_elsewhere(sharded, tmp_path, feed(), "6GiB", 4).num_processes == 4


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"), [(1, 4, 3), (2, 4, 6), (0.1, 4, 1), (1, 5, 2), (3, 100, 1)]
)
def test_epochs_are_steps(tiny_recipe, epochs, batch_size, steps):
    recipe = tiny_recipe(train={"steps": None, "epochs": epochs, "batch_size": batch_size})
    assert num_steps(recipe, 12) == steps


def test_a_stream_has_as_many_steps_as_it_is_given(tiny_recipe):
    assert num_steps(tiny_recipe(), None) == 4


def test_warmup_may_not_be_all_of_the_run(tiny_recipe):
    recipe = tiny_recipe(train={"steps": None, "epochs": 1, "warmup_steps": 3})
    with pytest.raises(UserError, match=r"train.warmup_steps \(3\) must be less than the 3 steps"):
        num_steps(recipe, 12)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
ARCHITECTURES = [
    LlamaConfig(**SIZES, num_key_value_heads=1),
    MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=32),
    Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16),
    PhiConfig(**SIZES),
    GPTNeoXConfig(**SIZES),
    # has no scaled dot product attention, so its samples are not packed
    BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=512),
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_any_architecture_is_planned(tiny_recipe, tmp_path, config, packing):
    recipe = tiny_recipe(data={"packing": packing})
    config.save_pretrained(tmp_path / "config")
    made = make_plan(recipe, tmp_path / "config", feed(), CPU)
    assert made.memory.activations > 0 and made.memory.logits > 0
    assert {layer.format for layer in made.layers} == {"nf4", "bfloat16"}
