"""What each word for `adapter` puts onto a base, and what comes back from a run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from qtune.errors import UserError
from qtune.export.exporter import write_run_adapter
from qtune.model.adapt import adapt, load_trained, quant_lora_layers, with_storages
from qtune.model.load import load_base
from qtune.model.quant_config import QtuneConfig
from qtune.model.skeleton import meta_model
from qtune.quant.linear import QuantLinear, unpacked
from qtune.quant.storage import Storage
from qtune.recipe import Quant, Recipe, Scales

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).unsqueeze(0)
INT4 = Quant(format="int4", group_size=32)
Make = Callable[..., Recipe]
KINDS = {
    "scales": {"adapter": "scales"},
    "zeros": {"adapter": "scales", "scales": Scales(zeros=True)},
    "both": {"adapter": "lora + scales"},
    "qa": {"adapter": "qa-lora"},
}


def fresh(recipe: Recipe) -> PeftModel:
    torch.manual_seed(0)
    return adapt(load_base(Path(recipe.model), recipe.quant, device=CPU), recipe)


def shake(model: PeftModel) -> PeftModel:
    """The model as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def trained_names(model: nn.Module) -> set[str]:
    """The last parts of the names of trained parameters."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name.replace(".default", "").removesuffix(".weight").split(".")[-1] for name in names}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("scales", {"scales"}),
        ("zeros", {"scales", "shifts"}),
        ("both", {"scales", "lora_A", "lora_B"}),
        ("qa", {"lora_A", "lora_B"}),
    ],
)
def test_what_is_trained(tiny_recipe: Make, kind: str, expected: set[str]) -> None:
    model = fresh(tiny_recipe(quant=INT4, **KINDS[kind]))
    assert isinstance(model, PeftModel) and len(list(quant_lora_layers(model))) == 14
    assert trained_names(model) == expected
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_plain_lora_is_as_ever(tiny_recipe: Make) -> None:
    assert trained_names(fresh(tiny_recipe(quant=Quant(format=None)))) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_at_its_base(tiny_recipe: Make, kind: str) -> None:
    recipe = tiny_recipe(quant=INT4, **KINDS[kind])
    base = load_base(Path(recipe.model), recipe.quant, device=CPU)
    assert torch.equal(logits(fresh(recipe).eval()), logits(base))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_folder_gives_back(tiny_recipe: Make, kind: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(quant=INT4, **KINDS[kind])
    model = shake(fresh(recipe))
    write_run_adapter(model, tmp_path / "adapter", recipe.model)
    base = load_base(Path(recipe.model), recipe.quant, device=CPU)
    before = logits(base)
    loaded = load_trained(base, tmp_path / "adapter")
    assert not any(p.requires_grad for p in loaded.parameters())
    change = (logits(loaded) - logits(model)).norm() / logits(model).norm()
    assert change < 0.01 and not torch.equal(before, logits(loaded))
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(loaded), before) and torch.equal(logits(model), before)
    config = base.config.quantization_config
    layers = {n: m for n, m in base.named_modules() if isinstance(m, QuantLinear)}
    stored = {name.replace(".base_layer", ""): layer.storage for name, layer in layers.items()}
    assert stored == {name: config.storage(name) for name in stored}
    again = QtuneConfig(**config.to_dict())
    assert stored == {name: again.storage(name) for name in stored}


def test_scales_alone_come_back_bit_for_bit(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(quant=INT4, **KINDS["zeros"])
    model = shake(fresh(recipe))
    write_run_adapter(model, tmp_path / "adapter", recipe.model)
    loaded = load_trained(
        load_base(Path(recipe.model), recipe.quant, device=CPU), tmp_path / "adapter"
    )
    assert torch.equal(logits(loaded), logits(model))
    with unpacked(loaded), unpacked(model):
        assert torch.equal(logits(loaded), logits(model))


def test_layers_of_several_formats(tiny_recipe: Make) -> None:
    quant = Quant(format="nf4", layers={"down_proj": "int3"})
    recipe = tiny_recipe(quant=quant, adapter="scales", scales=Scales(zeros=True))
    model = fresh(recipe)
    with_zeros = {
        name
        for name, layer in quant_lora_layers(model)
        if layer.trained_scales is not None and layer.trained_scales.shifts is not None
    }
    assert {name.rpartition(".")[2] for name in with_zeros} == {"down_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_has_the_same_parameters_without_data(tiny_recipe: Make, kind: str) -> None:
    recipe = tiny_recipe(quant=INT4, **KINDS[kind])
    planned = adapt(meta_model(AutoConfig.from_pretrained(recipe.model), recipe), recipe)
    sizes = {n: (p.shape, p.dtype, p.requires_grad) for n, p in planned.named_parameters()}
    made = fresh(recipe)
    real = {n: (p.shape, p.dtype, p.requires_grad) for n, p in made.named_parameters()}
    assert sizes == real and all(p.is_meta for p in planned.parameters())


def test_targets_choose_the_layers(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(quant=INT4, adapter="scales", lora={"target_modules": ("q_proj",)})
    names = [name for name, _ in quant_lora_layers(fresh(recipe))]
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_layers_that_are_not_quantized_get_lora_only(tiny_recipe: Make) -> None:
    quant = Quant(format="int4", group_size=32, skip=("lm_head", "o_proj"))
    scales = fresh(tiny_recipe(quant=quant, adapter="scales"))
    assert len(list(quant_lora_layers(scales))) == 12
    both = fresh(tiny_recipe(quant=quant, adapter="lora + scales"))
    adapted = {n for n, p in both.named_parameters() if p.requires_grad and "o_proj" in n}
    assert len(adapted) == 4 and all("lora_" in name for name in adapted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"lora": {"dora": True}}, "lora.dora goes by the length"),
    "no zeros": ({"scales": Scales(zeros=True)}, "quant.format: nf4 has no zero points"),
    "int8 inputs": (
        {"quant": Quant(format="int8", activations="int8")},
        "quant.activations: int8 multiplies integers",
    ),
    "no layer": (
        {"quant": Quant(skip=("q_proj", "lm_head")), "lora": {"target_modules": "q_proj"}},
        "lora.target_modules names no quantized layer",
    ),
    "one group": (
        {"adapter": "qa-lora", "quant": Quant(format="int4", group_size="tensor")},
        "are not parts of the rows of model.layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(tiny_recipe: Make, changes: dict[str, Any], message: str) -> None:
    recipe = tiny_recipe(**{"adapter": "scales", **changes})
    with pytest.raises(UserError, match=message):
        adapt(meta_model(AutoConfig.from_pretrained(recipe.model), recipe), recipe)


def test_the_configuration_names_what_differs() -> None:
    config = QtuneConfig("int4", 32, layers={"a": {"format": "int3"}})
    layers = {
        name: QuantLinear(64, 4, storage=storage, device="meta")
        for name, storage in {
            "x.a": Storage("int3", 32, scales="half"),
            "x.b": Storage("int4", 32, zeros="float"),
        }.items()
    }
    made = with_storages(config, layers)
    assert made.layers["x.a"] == {"format": "int3", "scales": "half"}
    assert made.layers["x.b"] == {"zeros": "float"}
    assert config.layers == {"a": {"format": "int3"}}
    assert made.storage("y.a") == Storage("int3", 32)


def test_peft_merges_trained_scales_into_dense_layers_and_not_into_codes(tiny_recipe: Make) -> None:
    model = shake(fresh(tiny_recipe(quant=INT4, **KINDS["both"])))
    expected = logits(model)
    _, layer = next(quant_lora_layers(model))
    with pytest.raises(UserError, match="no part of new codes"):
        layer.merge()
    dense = model.merge_and_unload()
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())
    assert (logits(dense) - expected).norm() / expected.norm() < 0.02
