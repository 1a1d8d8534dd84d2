"""The layers of a merge-aware model together: new codes, and when they are used."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from qtune.errors import UserError
from qtune.model import served_codes
from qtune.model.adapt import adapt, quant_lora_layers
from qtune.model.checkpoint import stored_tensor
from qtune.model.load import load_base
from qtune.quant.dither import original_places
from qtune.recipe import Quant, Recipe

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).unsqueeze(0)
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tiny_recipe: Make) -> Recipe:
    return tiny_recipe(quant=Quant(format="int4", group_size=32), train={"merge_aware": True})


def fresh(recipe: Recipe) -> PeftModel:
    torch.manual_seed(0)
    return adapt(load_base(Path(recipe.model), recipe.quant, device=CPU), recipe).eval()


def shake(model: PeftModel) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_places_are_those_of_the_weights_in_the_folder(recipe: Recipe) -> None:
    model = fresh(recipe)
    served_codes.take_originals(model, Path(recipe.model))
    layers = dict(quant_lora_layers(model))
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = stored_tensor(Path(recipe.model) / "model.safetensors", f"{name}.weight")
        assert layer.merge_aware is not None and layer.merge_aware.places is not None
        expected = original_places(layer.quantized, weight)
        assert torch.equal(layer.merge_aware.places, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"merge_aware": True, "merge_aware_originals": False}},
        {"quant": Quant(format="int4", group_size=32, method="gptq")},
    ],
    ids=["as wanted", "calibrated"],
)
def test_random_places_need_no_weights_and_no_room(
    recipe: Recipe, tiny_recipe: Make, change: dict[str, object]
) -> None:
    given = {"quant": recipe.quant, "train": {"merge_aware": True}} | change
    base = load_base(Path(recipe.model), recipe.quant, device=CPU)
    model = adapt(base, tiny_recipe(**given))
    served_codes.take_originals(model, Path("nowhere"))
    found = [layer.merge_aware for _, layer in quant_lora_layers(model)]
    assert len(found) == 14
    assert all(merged is not None and merged.places is None for merged in found)


def test_a_folder_without_the_weights_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    model, name = fresh(recipe), "model.layers.0.self_attn.q_proj.weight"
    for dtype in (None, torch.uint8):
        stored = {"model.norm.weight": torch.ones(64)}
        if dtype is not None:
            stored[name] = torch.ones(64, 64, dtype=dtype)
        save_file(stored, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"has no {name} in 16 bits"):
            served_codes.take_originals(model, tmp_path)


def test_fresh_codes_are_those_of_the_base(recipe: Recipe) -> None:
    model = fresh(recipe)
    with model.disable_adapter():
        expected = logits(model)
    with served_codes.serving(model):
        assert torch.equal(logits(model), expected)


def test_codes_are_used_for_a_while_or_until_told(recipe: Recipe) -> None:
    model = fresh(recipe)
    shake(model)
    plain = logits(model)
    with served_codes.serving(model):
        served = logits(model)
    assert torch.equal(logits(model), plain) and not torch.equal(served, plain)
    served_codes.renew(model)
    served_codes.serve(model, True)
    assert torch.equal(logits(model), served)
    with served_codes.serving(model):
        assert torch.equal(logits(model), served)
    assert torch.equal(logits(model), served)
    served_codes.serve(model, False)
    assert torch.equal(logits(model), plain)


def test_a_plain_model_is_left_alone(tiny_recipe: Make) -> None:
    model = fresh(tiny_recipe())
    shake(model)
    plain = logits(model)
    with served_codes.serving(model):
        assert torch.equal(logits(model), plain)
