"""Quantized experts against transformers' own code on the weights that the codes stand for."""

from pathlib import Path

import pytest
import torch
from mixtures import FAMILIES, load_mixture, save_mixture, token_ids
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtune.model import experts
from qtune.model.load import add_adapter
from qtune.model.quantizer import QtuneConfig, quantized_on_meta
from qtune.quant.linear import QuantLinear
from qtune.recipe import Lora

families = pytest.mark.parametrize("family", FAMILIES)


def dense_twin(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model, plain loops over experts, with the weights of the codes."""
    twin = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    fused: dict[str, Tensor] = {}
    for name, transposed, layers in experts.expert_layers(model):
        weight = torch.stack([layer.dequantize(torch.float32) for layer in layers.values()])
        fused[name] = weight.transpose(1, 2) if transposed else weight
    with torch.no_grad():
        for name, weight in fused.items():
            twin.get_parameter(name).copy_(weight)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and ".expert_" not in name:
                twin.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
    return twin.eval()


@families
def test_logits_and_input_gradients_are_those_of_the_dense_model(
    tmp_path: Path, family: str
) -> None:
    model = load_mixture(save_mixture(tmp_path, family))
    twin = dense_twin(tmp_path, model)
    found = []
    for each in (model, twin):
        embedded = each.get_input_embeddings()(token_ids()).detach().requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        logits.square().mean().backward()
        found.append((logits.detach(), embedded.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@families
def test_every_expert_is_quantized(tmp_path: Path, family: str) -> None:
    model = load_mixture(save_mixture(tmp_path, family))
    dense = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 or ("experts" in name and parameter.dtype != torch.uint8)
    ]
    assert all(name.endswith("_bias") for name in dense)
    sizes = [len(layers) for _, _, layers in experts.expert_layers(model)]
    assert sizes and set(sizes) == {4}


@families
def test_saved_and_loaded_again(tmp_path: Path, family: str) -> None:
    model = load_mixture(save_mixture(tmp_path / "dense", family))
    model.save_pretrained(tmp_path / "quantized")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, again(token_ids()).logits)


@families
def test_meta_model_has_the_layers_of_the_loaded_one(tmp_path: Path, family: str) -> None:
    model = load_mixture(save_mixture(tmp_path, family))
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
        )
    quantized_on_meta(planned, QtuneConfig(group_size=32))
    shapes = [
        {name: (p.shape, p.dtype) for name, p in each.named_parameters()}
        for each in (planned, model)
    ]
    assert shapes[0] == shapes[1]
    assert planned(token_ids().to("meta")).logits.shape == (2, 9, 97)


@families
def test_stored_names_are_those_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    model = load_mixture(save_mixture(tmp_path, family))
    stored = load_file(tmp_path / "model.safetensors")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, transposed, _ in experts.expert_layers(model):
        weight = twin.get_parameter(name).detach()
        fused = weight.transpose(1, 2) if transposed else weight
        found = experts.stored_tensors(model, name, fused, transposed=transposed)
        assert found and all(torch.equal(stored[key], tensor) for key, tensor in found.items())


def test_skipped_experts_stay_as_they_are(tmp_path: Path) -> None:
    save_mixture(tmp_path, "qwen3_moe")
    config = QtuneConfig(group_size=32, skip=["lm_head", "layers.0.mlp.experts"])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )
    names = [name for name, _, _ in experts.expert_layers(model)]
    assert names == [f"model.layers.1.mlp.experts.{m}" for m in ("gate_up_proj", "down_proj")]
    twin = dense_twin(tmp_path, model)
    with torch.no_grad():
        ours, theirs = model(token_ids()).logits, twin(token_ids()).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_step_gives_the_same_bits_each_time(tmp_path: Path) -> None:
    model = load_mixture(save_mixture(tmp_path, "mixtral"))
    tuned = add_adapter(model, Lora(rank=2, experts=True))
    found = []
    for _ in range(2):
        tuned.zero_grad()
        tuned(token_ids(), labels=token_ids()).loss.backward()
        found.append([p.grad.clone() for p in tuned.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adapters_of_experts_that_no_token_chose_have_gradients(tmp_path: Path) -> None:
    model = load_mixture(save_mixture(tmp_path, "mixtral"))
    tuned = add_adapter(model, Lora(rank=2, experts=True))
    tuned(token_ids()[:1, :1], labels=token_ids()[:1, :1]).logits.sum().backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(not p.grad.any() for p in trained)
