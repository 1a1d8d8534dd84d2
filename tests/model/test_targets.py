"""Which layers PEFT is told to adapt."""

from pathlib import Path

import pytest
import torch
from mixtures import load_mixture, save_mixture, token_ids
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qtune.errors import UserError
from qtune.export.adapter import write_adapter
from qtune.model.load import add_adapter, load_base
from qtune.model.targets import adapter_targets
from qtune.recipe import Lora

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_dense_models_take_the_recipe_s_word(tiny_model: Path) -> None:
    model = load_base(tiny_model, None, device=torch.device("cpu"))
    assert adapter_targets(model, Lora()) == "all-linear"
    assert adapter_targets(model, Lora(target_modules="q_proj")) == ["q_proj"]
    with pytest.raises(UserError, match=r"lora\.experts: this model has no quantized experts"):
        adapter_targets(model, Lora(experts=True))


def test_mixtures_leave_out_what_peft_takes_for_experts(tmp_path: Path) -> None:
    model = load_mixture(save_mixture(tmp_path, "deepseek_v3"))
    projections = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"}
    assert set(adapter_targets(model, Lora())) == projections
    with pytest.raises(UserError, match=r"'gate_proj' is what PEFT calls the experts"):
        adapter_targets(model, Lora(target_modules=("q_a_proj", "gate_proj")))


def test_experts_are_added_on_request(tmp_path: Path) -> None:
    model = load_mixture(save_mixture(tmp_path, "mixtral"))
    named = [f"expert_{i}" for i in range(4)]
    assert adapter_targets(model, Lora(experts=True)) == named + ATTENTION
    only_q = Lora(experts=True, target_modules="q_proj")
    assert adapter_targets(model, only_q) == [*named, "q_proj"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapter_of_a_mixture_loads_on_the_original_model_by_peft_alone(
    tmp_path: Path, family: str
) -> None:
    model = add_adapter(load_mixture(save_mixture(tmp_path / "base", family)), Lora(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", str(tmp_path / "base"), None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert {name.split(".")[-1] for name in loaded.targeted_module_names} == set(ATTENTION)
    ours = {n: p for n, p in model.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        tuned = loaded(token_ids()).logits
        with loaded.disable_adapter():
            assert not torch.allclose(tuned, loaded(token_ids()).logits, atol=0.01)
