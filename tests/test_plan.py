import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from qtune import plan
from qtune.data.order import micro_batches, rows_of_step
from qtune.errors import UserError
from qtune.model.load import add_adapter, load_base
from qtune.plan import make_plan, num_steps
from qtune.setup import open_setup

CPU = torch.device("cpu")


def planned(recipe, **options):
    setup = open_setup(recipe, Accelerator())
    return make_plan(recipe, setup.base, setup.data.train, CPU, **options), setup


@pytest.mark.parametrize("format_name", ["nf4", "int8", None])
@pytest.mark.parametrize("lora", [{}, {"dora": True, "target_modules": ("q_proj", "down_proj")}])
def test_bytes_are_those_of_the_loaded_model(tiny_recipe, format_name, lora):
    recipe = tiny_recipe(quant={"format": format_name}, lora=lora)
    made, setup = planned(recipe)
    model = add_adapter(load_base(setup.base, recipe.quant, device=CPU), recipe.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert made.memory.weights == sum(p.nbytes for p in frozen)
    assert made.memory.adapter == made.memory.gradients == sum(p.nbytes for p in trained)
    assert made.num_trained == sum(p.numel() for p in trained)

    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert made.memory.optimizer == sum(t.nbytes for t in moments)


def test_layers_are_named_with_their_format(tiny_recipe):
    made, _ = planned(tiny_recipe(quant={"skip": ("lm_head", "k_proj")}))
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
    made, _ = planned(tiny_recipe())
    read = json.loads(json.dumps(made.to_json()))
    assert read["memory"]["total"] == made.memory.total > made.memory.activations > 0
    assert read["expected_minutes"] > 0 and read["steps"] == 4
    assert read["layers"][0].keys() == {"name", "shape", "format", "size_bytes"}
    assert read["available_bytes"] > read["memory"]["total"]
    assert read["recompute"]["policy"] == "none"
    assert read["recompute"]["reason"] == "everything fits"
    assert read["recompute"]["total_bytes"]["none"] == read["memory"]["total"]


def test_what_is_made_again_follows_the_free_memory(tiny_recipe):
    sizes = planned(tiny_recipe())[0].recompute.total_bytes
    assert list(sizes) == ["none", "cheap", "all"]
    for policy in ("cheap", "all"):
        free = int(sizes[policy] / 0.89)
        made, _ = planned(tiny_recipe(), free_bytes=free)
        assert (made.recompute.policy, made.available_bytes) == (policy, free)
        assert made.memory.total == sizes[policy]
    with pytest.raises(UserError, match=r"most goes to .*: try a smaller train.micro_batch"):
        planned(tiny_recipe(), free_bytes=sizes["all"] - 1)
    with pytest.raises(UserError, match=r"train.recompute: all or a smaller train.micro_batch"):
        planned(tiny_recipe(train={"recompute": "none"}), free_bytes=sizes["all"])


def test_a_run_that_goes_on_is_planned_as_it_began(tiny_recipe):
    for policy in ("none", "cheap", "all"):
        assert planned(tiny_recipe(), begun_with=policy)[0].recompute.policy == policy


def test_a_policy_that_the_model_cannot_follow_is_left_out(tiny_recipe, monkeypatch):
    def doubling(self, x):
        # in place, as GPT-OSS adds biases to products of its experts
        return self.down_proj(self.gate_proj(x).mul_(2))

    monkeypatch.setattr(LlamaMLP, "forward", doubling)
    assert list(planned(tiny_recipe())[0].recompute.total_bytes) == ["none", "all"]
    with pytest.raises(UserError, match=r"cheap does not work .* to auto, or to none or all"):
        planned(tiny_recipe(train={"recompute": "cheap"}))


def test_a_model_without_blocks_keeps_everything(tiny_recipe, monkeypatch):
    monkeypatch.setattr(plan.recompute, "blocks", lambda model: iter(()))
    assert list(planned(tiny_recipe())[0].recompute.total_bytes) == ["none"]
    with pytest.raises(UserError, match="cheap does not work with this model; set it to auto"):
        planned(tiny_recipe(train={"recompute": "cheap"}))


def test_the_largest_micro_batch_of_the_run_is_planned_for(tiny_recipe):
    recipe = tiny_recipe(train={"steps": 9, "batch_size": 5, "micro_batch_tokens": 400})
    _, setup = planned(recipe)
    samples = setup.data.train
    sizes = [
        sum(len(sample.ids) for sample in group)
        for step in range(9)
        for group in micro_batches([samples[i] for i in rows_of_step(12, 5, 0, step)], 400)
    ]
    found = plan._largest_micro_batch(recipe, samples, 9, 1)
    assert sum(len(sample.ids) for sample in found) == max(sizes)
    assert len(plan._largest_micro_batch(recipe, samples, 9, 5)) == 1


def test_processes_share_the_work_of_a_step(tiny_recipe):
    recipe = tiny_recipe()
    (one, _), (two, _) = planned(recipe), planned(recipe, num_processes=2)
    assert two.memory.activations < one.memory.activations
    assert (two.steps, two.layers) == (one.steps, one.layers)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"), [(1, 4, 3), (2, 4, 6), (0.1, 4, 1), (1, 5, 2), (3, 100, 1)]
)
def test_epochs_are_steps(tiny_recipe, epochs, batch_size, steps):
    recipe = tiny_recipe(train={"steps": None, "epochs": epochs, "batch_size": batch_size})
    assert num_steps(recipe, 12) == steps


def test_warmup_may_not_be_all_of_the_run(tiny_recipe):
    recipe = tiny_recipe(train={"steps": None, "epochs": 1, "warmup_steps": 3})
    with pytest.raises(UserError, match=r"train.warmup_steps \(3\) must be less than the 3 steps"):
        num_steps(recipe, 12)


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("activations", "train.recompute: all or a smaller train.micro_batch_tokens"),
        ("backward", "smaller train.micro_batch_tokens"),
        ("logits", "smaller train.micro_batch_tokens"),
        ("weights", "quant.format: nf4"),
        ("optimizer", "smaller lora.rank"),
    ],
)
def test_what_needs_most_memory_is_named(tiny_recipe, part, advice):
    made, _ = planned(tiny_recipe())
    too_big = replace(made, memory=replace(made.memory, **{part: 2**50}))
    with pytest.raises(UserError, match=f"1048576.0 GiB.*most goes to {part}") as error:
        plan._check_fits(too_big)
    assert advice in str(error.value)


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


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_any_architecture_is_planned(tiny_recipe, tmp_path, config):
    recipe = tiny_recipe()
    setup = open_setup(recipe, Accelerator())
    config.save_pretrained(tmp_path / "config")
    made = make_plan(recipe, tmp_path / "config", setup.data.train, CPU)
    assert made.memory.activations > 0 and made.memory.logits > 0
    assert {layer.format for layer in made.layers} == {"nf4", "bfloat16"}
