from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from qtune.data.collate import collate
from qtune.model.load import add_adapter, load_base
from qtune.setup import open_setup
from qtune.train.objectives import sft


def test_the_sum_and_its_gradient_are_those_of_a_plain_float64_computation(tiny_recipe):
    recipe = tiny_recipe(quant={"format": None}, lora={"target_modules": ("v_proj",)})
    samples = open_setup(recipe, Accelerator()).data.train[:3]
    base = load_base(Path(recipe.model), None, device=torch.device("cpu"), dtype=torch.float32)
    model = add_adapter(base, recipe.lora)
    loss, count = sft.loss(model, collate(samples))
    loss.backward()

    truth = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float64)
    layer = truth.model.layers[1].self_attn.v_proj
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logits = truth(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        for at, supervised in enumerate(sample.supervised):
            if supervised:
                total = total - logits[at - 1, sample.ids[at]]
    total.backward()
    assert count == sum(sum(sample.supervised) for sample in samples)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    # as it starts, B is zero; its gradient is that of the weight times A, scaled
    adapted = model.get_base_model().model.layers[1].self_attn.v_proj
    a, scale = adapted.lora_A["default"].weight.double(), adapted.scaling["default"]
    expected = scale * layer.weight.grad @ a.T
    found = adapted.lora_B["default"].weight.grad.double()
    assert (found - expected).norm() < 1e-4 * expected.norm()
