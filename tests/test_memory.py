from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig

from qtune import memory
from qtune.data.collate import collate
from qtune.memory import Peak, available_bytes, kept_for_backward, training_memory
from qtune.model.load import add_adapter, load_base
from qtune.plan import meta_model
from qtune.quant.linear import QuantLinear
from qtune.setup import open_setup
from qtune.train.objectives import sft

CPU = torch.device("cpu")
VARIANTS = {
    "plain": {},
    "16-bit": {"quant": {"format": None}},
    "dropout": {"lora": {"dropout": 0.1}},
    "dora": {"lora": {"dora": True}},
    "few": {"lora": {"target_modules": ("v_proj",)}},
}


def on_meta(recipe):
    model = add_adapter(meta_model(AutoConfig.from_pretrained(recipe.model), recipe), recipe.lora)
    return model.train()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_activations_are_what_autograd_keeps_of_the_real_model(tiny_recipe, variant, num_samples):
    recipe = tiny_recipe(**VARIANTS[variant])
    samples = open_setup(recipe, Accelerator()).data.train[:num_samples]
    real = load_base(Path(recipe.model), recipe.quant, device=CPU)
    real = add_adapter(real, recipe.lora).train()
    kept, logits = kept_for_backward(real, collate(samples))
    planned = training_memory(on_meta(recipe), collate(samples, "meta"), CPU, checkpointing=False)
    # what attention widens on the CPU before it fills up samples of different lengths is not seen
    assert planned.activations == pytest.approx(kept, rel=0 if num_samples == 1 else 0.1)
    # the loss keeps their gradient beside them
    assert planned.logits == 2 * logits.nbytes


def test_kept_bytes_of_a_known_layer():
    layer = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Sigmoid())
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(3, 8))
    # the input, the sigmoid's output; the weight's gradient needs no weight
    assert sum(kept.values()) == 3 * 8 * 4 + 3 * 4 * 4


def test_a_step_keeps_nothing_that_was_not_planned(tiny_recipe):
    """The whole step's saved bytes, loss included, are activations and logits."""
    recipe = tiny_recipe()
    samples = open_setup(recipe, Accelerator()).data.train[:3]
    model = add_adapter(
        load_base(Path(recipe.model), recipe.quant, device=CPU), recipe.lora
    ).train()
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sft.loss(model, collate(samples))
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)
    planned = training_memory(on_meta(recipe), collate(samples, "meta"), CPU, checkpointing=False)
    assert planned.activations + planned.logits / 2 == pytest.approx(found, rel=0.1)


def test_long_samples_keep_no_square_matrices(tiny_recipe):
    recipe = tiny_recipe()
    sample = open_setup(recipe, Accelerator()).data.train[0]
    model = on_meta(recipe)
    kept = []
    for times in (8, 16):
        long = type(sample)(sample.row, sample.ids * times, sample.supervised * times)
        batch = collate([long], "meta")
        planned = training_memory(model, batch, torch.device("cuda"), checkpointing=False)
        kept.append(planned.activations)
    assert kept[1] < 2.01 * kept[0]


def test_checkpointing_keeps_less(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(open_setup(recipe, Accelerator()).data.train[:4], "meta")
    model = on_meta(recipe)
    plain, checkpointed = (
        training_memory(model, batch, CPU, checkpointing=on) for on in (False, True)
    )
    inputs = batch.input_ids.numel() * 64 * 2
    assert checkpointed.activations == 2 * inputs + plain.activations // 2
    assert checkpointed.weights == plain.weights


def test_the_largest_matrix_is_counted_once_more_while_it_is_dequantized(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(open_setup(recipe, Accelerator()).data.train[:1], "meta")
    model = on_meta(recipe)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    largest = max(layer.in_features * layer.out_features for layer in layers)
    planned = training_memory(model, batch, CPU, checkpointing=False)
    assert planned.temporary == largest * 2
    assert planned.total == sum(getattr(planned, name) for name in planned.__dataclass_fields__)


def test_peak_sees_what_is_gone_again():
    peak = Peak(CPU)
    size = 64 << 20
    torch.ones(size, dtype=torch.uint8)
    assert peak.bytes() > 0.9 * size


def test_peak_without_help_from_the_system(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    peak = Peak(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.bytes() > 0.9 * held.nbytes


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    machine = available_bytes(CPU)
    assert machine == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 2000\n")
    assert available_bytes(CPU) == 5000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_bytes(CPU) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) > 5000
