from itertools import accumulate
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from qtune.data.collate import collate
from qtune.memory import training_memory
from qtune.model.head import output_head
from qtune.model.load import add_adapter, load_base
from qtune.plan import meta_model
from qtune.quant.linear import QuantLinear
from qtune.setup import open_setup
from qtune.train import recompute
from qtune.train.objectives import sft
from qtune.train.recompute import POLICIES
from qtune_kernels.cpu import jit

CPU = torch.device("cpu")
# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
VARIANTS = {
    "plain": {},
    "16-bit": {"quant": {"format": None}},
    "dropout": {"lora": {"dropout": 0.1}},
    "dora": {"lora": {"dora": True}},
    "head": {"lora": {"modules_to_save": ("lm_head",)}},
}


def on_meta(recipe):
    return add_adapter(meta_model(AutoConfig.from_pretrained(recipe.model), recipe), recipe.lora)


def loaded(recipe):
    return add_adapter(load_base(Path(recipe.model), recipe.quant, device=CPU), recipe.lora).train()


def training_samples(recipe, count):
    return open_setup(recipe, Accelerator()).data.train[:count]


def allocated(model, batch):
    """Bytes that PyTorch's allocator has given out between forward and backward, and at most."""
    # gradients and scratch buffers are there from the second step on
    sft.loss(model, batch)[0].backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        loss, _ = sft.loss(model, batch)
        with record_function("between"):
            pass
        loss.backward()
    events = found.profiler.kineto_results.events()
    (between,) = (event.start_ns() for event in events if event.name() == "between")
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    kept = sum(size for at, size in changes if at < between)
    return kept, max(accumulate(size for _, size in changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_takes_what_was_planned(tiny_recipe, variant):
    recipe = tiny_recipe(**VARIANTS[variant])
    samples = training_samples(recipe, 4)
    real, model = loaded(recipe), on_meta(recipe)
    for policy in POLICIES:
        recompute.use(real, policy)
        kept, peak = allocated(real, collate(samples))
        planned = training_memory(model, collate(samples, "meta"), CPU, policy)
        # the logits of a frozen head lie in a buffer of their own
        found = planned.activations + (planned.logits if variant == "head" else 0)
        # each checkpoint keeps the state of the random number generator besides
        states = 0 if policy == "none" else 2 * torch.get_rng_state().nbytes
        assert found == pytest.approx(kept - states, rel=0.02), policy
        # and kernels take memory while they run, plain PyTorch in their place much more
        if jit.available():
            assert found + planned.backward == pytest.approx(peak, rel=0.1), policy


def test_each_policy_keeps_less_than_the_one_before(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(training_samples(recipe, 4), "meta")
    model = on_meta(recipe)
    none, cheap, everything = (training_memory(model, batch, CPU, p) for p in POLICIES)
    assert none.activations > cheap.activations > everything.activations
    assert none.total > cheap.total > everything.total
    assert none.backward <= cheap.backward <= everything.backward
    assert none.weights == cheap.weights == everything.weights


def test_a_planned_model_is_left_as_it_was(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(training_samples(recipe, 2), "meta")
    model = on_meta(recipe)
    first, _, again = (training_memory(model, batch, CPU, p) for p in ("none", "all", "none"))
    # but for a few indices that are cached from then on
    assert again.total == pytest.approx(first.total, rel=0.002)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_long_samples_keep_no_square_matrices(tiny_recipe):
    recipe = tiny_recipe()
    (sample,) = training_samples(recipe, 1)
    model = on_meta(recipe)
    for policy in POLICIES:
        kept = []
        for times in (8, 16):
            long = type(sample)(sample.row, sample.ids * times, sample.supervised * times)
            batch = collate([long], "meta")
            planned = training_memory(model, batch, torch.device("cuda"), policy)
            kept.append(planned.activations + planned.backward)
        assert kept[1] < 2.01 * kept[0]


def test_logits_of_a_frozen_head_are_a_chunk(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(training_samples(recipe, 4), "meta")
    model = on_meta(recipe)
    planned = training_memory(model, batch, CPU, "none")
    assert planned.logits == output_head(model).logits_bytes(len(batch.targets), CPU)


def test_logits_of_a_trained_head_are_all_there(tiny_recipe):
    recipe = tiny_recipe(**VARIANTS["head"])
    batch = collate(training_samples(recipe, 4), "meta")
    planned = training_memory(on_meta(recipe), batch, CPU, "none")
    assert planned.logits == len(batch.targets) * 512 * 2
    # their gradient is made beside them
    assert planned.backward >= planned.logits


def test_the_largest_matrix_is_counted_once_more_while_it_is_dequantized(tiny_recipe):
    recipe = tiny_recipe()
    batch = collate(training_samples(recipe, 1), "meta")
    model = on_meta(recipe)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    largest = max(layer.in_features * layer.out_features for layer in layers)
    planned = training_memory(model, batch, CPU, "none")
    assert planned.temporary == largest * 2
    assert planned.total == sum(getattr(planned, name) for name in planned.__dataclass_fields__)
