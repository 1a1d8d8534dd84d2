from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.data.chat import Sample
from qtune.data.collate import collate
from qtune.data.rows import Row
from qtune.model import attention
from qtune.model.head import output_head
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


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 8.0},
}


def adapted(family):
    """A random model of the family in float32, with an adapter that does something."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL, **FAMILIES[family])
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    attention.use_packed(base)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
    )
    return get_peft_model(base, settings).train()


def random_batch():
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate((9, 5, 14)):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        supervised = [i > 0 and (i + number) % 3 != 0 for i in range(length)]
        samples.append(Sample(Row("t", number, []), ids, supervised))
    return collate(samples)


def loss_and_gradients(model):
    model.zero_grad()
    loss, _ = sft.loss(model, random_batch())
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_are_not_made_change_nothing(family, monkeypatch):
    model = adapted(family)
    assert output_head(model) is not None
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(model)
    assert not calls
    monkeypatch.setattr(sft, "output_head", lambda _: None)
    expected, truths = loss_and_gradients(model)
    assert calls
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, truth in truths.items():
        torch.testing.assert_close(gradients[name], truth, rtol=1e-3, atol=1e-5, msg=name)


def test_without_gradients_the_loss_is_the_same():
    model = adapted("llama").eval()
    expected, _ = sft.loss(model, random_batch())
    with torch.no_grad():
        found, _ = sft.loss(model, random_batch())
    assert torch.equal(found, expected) and not found.requires_grad


def test_a_head_that_is_trained_gets_its_gradient():
    model = adapted("llama")
    head = model.get_output_embeddings().requires_grad_(True)
    sft.loss(model, random_batch())[0].backward()
    assert head.weight.grad is not None
