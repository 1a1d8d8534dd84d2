"""Merged mixtures, as transformers loads them, against the adapter on the quantized experts."""

import shutil
from pathlib import Path

import pytest
import torch
from mixtures import FAMILIES, load_mixture, save_mixture, token_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qtune.model.load import add_adapter
from qtune.model.merge import merged_tensors
from qtune.model.merge_experts import fused_matrices
from qtune.recipe import Lora

families = pytest.mark.parametrize("family", FAMILIES)


def tuned_mixture(folder: Path, family: str, *, on_experts: bool) -> PeftModel:
    model = add_adapter(
        load_mixture(save_mixture(folder, family)), Lora(rank=4, experts=on_experts)
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def merge(base: Path, model: PeftModel, onto: str, target: Path) -> Path:
    target.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in merged_tensors(base, model, onto)}
    save_file(tensors, target / "model.safetensors")
    shutil.copy(base / "config.json", target)
    return target


@families
@pytest.mark.parametrize("on_experts", [False, True])
def test_merged_onto_the_codes_is_the_trained_model(
    tmp_path: Path, family: str, on_experts: bool
) -> None:
    model = tuned_mixture(tmp_path / "base", family, on_experts=on_experts)
    folder = merge(tmp_path / "base", model, "dequantized", tmp_path / "merged")
    assert (
        load_file(folder / "model.safetensors").keys()
        == load_file(tmp_path / "base/model.safetensors").keys()
    )
    merged, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        ours, theirs = merged(token_ids()).logits, model(token_ids()).logits
    # weights are rounded to bf16 once
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_merged_onto_the_original_adds_to_the_tensors_of_the_checkpoint(tmp_path: Path) -> None:
    model = tuned_mixture(tmp_path / "base", "mixtral", on_experts=True)
    before = load_file(tmp_path / "base/model.safetensors")
    merged = load_file(
        merge(tmp_path / "base", model, "original", tmp_path / "merged") / "model.safetensors"
    )
    gate_up = model.get_submodule(
        "base_model.model.model.layers.1.mlp.experts.gate_up_proj.expert_2"
    )
    delta = gate_up.get_delta_weight("default").float()
    for name, part in zip(("w1", "w3"), delta.chunk(2), strict=True):
        key = f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"
        assert torch.equal(merged[key], (before[key].float() + part).bfloat16())
        assert not torch.equal(merged[key], before[key])


def test_without_adapters_on_them_experts_pass_through_bit_for_bit(tmp_path: Path) -> None:
    model = tuned_mixture(tmp_path / "base", "qwen3_moe", on_experts=False)
    before = load_file(tmp_path / "base/model.safetensors")
    merged = load_file(
        merge(tmp_path / "base", model, "original", tmp_path / "merged") / "model.safetensors"
    )
    of_experts = [name for name in before if ".experts." in name]
    assert len(of_experts) == 2 * 4 * 3
    assert all(torch.equal(before[name], merged[name]) for name in of_experts)
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"],
        merged["model.layers.0.self_attn.q_proj.weight"],
    )


def test_a_folder_of_codes_has_the_names_of_the_model(tmp_path: Path) -> None:
    model = load_mixture(save_mixture(tmp_path / "base", "mixtral"))
    assert len(fused_matrices(model, tmp_path / "base")) == 4
    model.save_pretrained(tmp_path / "codes")
    assert fused_matrices(model, tmp_path / "codes") == []
