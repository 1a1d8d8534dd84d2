"""What a second quantization leaves of an adapter, against norms and products in float64."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qtune.model.load import add_adapter, load_base
from qtune.model.merge import quant_layers
from qtune.model.survival import explain, merge_report, pooled
from qtune.recipe import Lora, Quant

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=50,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def trained(folder: Path, size: float) -> PeftModel:
    """A model whose adapter changes the weights by about `size` of theirs."""
    settings = Lora(rank=8, alpha=8)
    model = add_adapter(load_base(folder, Quant(), device=CPU), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_A." in name:
                weight.normal_(0, 1)
            elif ".lora_B." in name:
                weight.normal_(0, 0.02 * size / 8**0.5)
    return model


def test_figures_are_norms_and_projections(folder: Path) -> None:
    model = trained(folder, 0.1)
    report = {one.name: one for one in merge_report(folder, model)}
    layers, original = quant_layers(model), load_file(folder / "model.safetensors")
    assert report.keys() == layers.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    state, prefix = model.state_dict(), "base_model.model.model.layers.1.mlp.up_proj"
    b, a = (state[f"{prefix}.lora_{x}.default.weight"].double() for x in "BA")
    change, weight = b @ a, original[name].double()
    base = layers[name].dequantize(torch.float32)
    again = copy.deepcopy(layers[name])
    again.quantize((base.double() + change).float())
    moved = (again.dequantize(torch.float32) - base).double()
    assert report[name].change_ratio == pytest.approx(
        float(change.norm() / weight.norm()), rel=1e-4
    )
    error = float((weight - base.double()).norm() / weight.norm())
    assert report[name].error_ratio == pytest.approx(error, rel=1e-4)
    share = float((moved * change).sum() / (change * change).sum())
    assert report[name].share == pytest.approx(share, rel=1e-3)
    assert 0.02 < error < 0.2


def test_small_changes_are_lost_and_large_ones_survive(folder: Path) -> None:
    small, large = (pooled(merge_report(folder, trained(folder, size))) for size in (0.003, 3))
    assert small is not None and large is not None
    assert small.change_ratio < 0.01 and small.share < 0.2
    assert large.change_ratio > 1 and large.share == pytest.approx(1, abs=0.05)


def test_pooled_adds_the_squares(folder: Path) -> None:
    report = merge_report(folder, trained(folder, 0.1))
    total = pooled(report)
    assert total is not None
    assert total.change == pytest.approx(sum(one.change for one in report))
    assert total.share == pytest.approx(sum(one.kept for one in report) / total.change)
    assert pooled([]) is None and list(explain([])) == []


def test_large_models_are_sampled_evenly(folder: Path) -> None:
    model = trained(folder, 0.1)
    weights = sum(x.in_features * x.out_features for x in quant_layers(model).values())
    sampled = merge_report(folder, model, max_weights=weights // 2)
    assert [one.name for one in sampled] == sorted(quant_layers(model))[::2]


def test_explanation_says_how_much_survives(folder: Path) -> None:
    report = merge_report(folder, trained(folder, 0.1))
    total = pooled(report)
    assert total is not None
    first, second = explain(report)
    assert f"{total.share:.1%} of the adapter survives" in first
    assert min(report, key=lambda one: one.share).name in second


def test_untrained_adapter_has_nothing_to_lose(folder: Path) -> None:
    model = add_adapter(load_base(folder, Quant(), device=CPU), Lora(rank=4))
    assert merge_report(folder, model) == []
