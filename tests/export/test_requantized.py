"""Merged weights that were quantized once, as exporters are given them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.export.adapter import has_tensors
from qtune.export.exporter import Trained, export
from qtune.export.folder import space
from qtune.export.qtune import QtuneExporter
from qtune.export.requantized import requantized
from qtune.export.verify import check_logits
from qtune.model.calibrated import calibrated_folder
from qtune.model.checkpoint import stored_tensors
from qtune.model.load import load_base
from qtune.model.merge import merged_tensors, quant_layers
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Lora, Merge, Quant

CPU = torch.device("cpu")
LAYER = "model.layers.1.mlp.up_proj.weight"


def text() -> Text:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 259, (16, 64), generator=generator).tolist()
    return Text(ids, "made up")


def test_nearest_codes_are_those_of_the_merged_weights(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("qwen2", lora=Lora(rank=4, alpha=8, modules_to_save=("lm_head",)))
    merged = dict(merged_tensors(trained.base_folder, trained.model, "original"))
    with requantized(replace(trained, form="merged"), Quant(format="int4"), tmp_path) as made:
        dense = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
        dense.weight = torch.nn.Parameter(merged[LAYER])
        expected = QuantLinear.from_linear(dense, Storage("int4"))
        found = quant_layers(made.model)[LAYER]
        for leaf in expected.tensor_names:
            assert torch.equal(getattr(found, leaf), getattr(expected, leaf)), leaf
        head = made.base.get_output_embeddings().get_parameter("weight")
        assert torch.equal(head, merged["lm_head.weight"])
        assert isinstance(made.model, PeftModel) and not has_tensors(made.model)
        assert made.recipe.quant.format == "int4" and made.start == {}


def test_calibrated_codes_are_those_of_the_exported_merge(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train("llama"), text=text)
    quant = Quant(format="int4", group_size=32, method="gptq")
    merged = export("bf16", trained, tmp_path / "bf16")
    recipe = replace(trained.recipe, quant=quant)
    folder = calibrated_folder(merged, recipe, text, device=CPU)
    base = load_base(folder, quant, device=CPU)
    with requantized(trained, quant, tmp_path) as made:
        layers = quant_layers(made.model)
        for name, layer in base.named_modules():
            if isinstance(layer, QuantLinear):
                found = layers.pop(f"{name}.weight")
                for leaf in layer.tensor_names:
                    assert torch.equal(getattr(found, leaf), getattr(layer, leaf)), name
        assert not layers


def test_factors_of_awq_are_folded_in_the_model_and_in_its_folder(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = replace(train("llama"), text=text)
    recipe = replace(trained.recipe, merge=Merge(method="awq"), quant=Quant(format="int4"))
    trained = replace(trained, recipe=recipe, form="merged")
    norm = "model.layers.0.input_layernorm.weight"
    original = dict(stored_tensors(trained.base_folder))[norm]
    with requantized(trained, Quant(format="int4", method="awq"), tmp_path) as made:
        storages = {n: layer.storage for n, layer in quant_layers(made.model).items()}
        assert not any(storage.channels for storage in storages.values())
        scales = {name.split(".")[-2]: storage.scales for name, storage in storages.items()}
        # 4 heads, 2 of keys and values: nothing before o_proj could take its factors
        assert scales == dict.fromkeys(scales, None) | {"up_proj": "half"}
        stored = dict(stored_tensors(made.base_folder))[norm]
        assert torch.equal(stored, made.base.get_parameter(norm))
        assert not torch.equal(stored, original)
        folder = tmp_path / "out"
        folder.mkdir()
        QtuneExporter().write(made, folder)
        model = QtuneExporter().load(folder, trained.base_folder, CPU)
        check_logits(model, made.model, rows, max_change=0)


def test_nothing_stays_beside_the_export_or_in_the_cache(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache = tmp_path / "place", tmp_path / "cache"
    place.mkdir()
    monkeypatch.setenv("QTUNE_CACHE", str(cache))
    trained = replace(train("llama"), text=text)
    with requantized(trained, Quant(format="int4", method="gptq"), place) as made:
        assert made.base_folder.is_relative_to(place)
    assert list(place.iterdir()) == [] and not cache.exists()


def test_the_original_weights_take_what_was_trained_beyond_the_start(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("llama")
    layer = trained.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    start = {LAYER.removesuffix(".weight"): (a.clone(), layer.scaling["default"] * b)}
    with requantized(replace(trained, start=start), Quant(format="int8"), tmp_path) as made:
        found = quant_layers(made.model)[LAYER].dequantize(torch.float32)
    with requantized(trained, Quant(format="int8"), tmp_path) as made:
        with_start = quant_layers(made.model)[LAYER].dequantize(torch.float32)
    original = dict(merged_tensors(trained.base_folder, trained.model, "original", start=start))
    assert torch.allclose(found, original[LAYER].float(), atol=0.02)
    assert not torch.allclose(with_start, original[LAYER].float(), atol=0.02)


def test_tied_parameters_that_went_separate_ways_are_both_there(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="tie"):
        trained = train("llama", lora=Lora(rank=4, modules_to_save=("lm_head",)))
    with requantized(trained, Quant(), tmp_path) as made:
        head = made.base.get_output_embeddings().get_parameter("weight")
        assert not torch.equal(head, made.base.get_input_embeddings().get_parameter("weight"))


def test_own_words_of_the_recipe_hold_for_the_merged_form(train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, quant=Quant(format=None, skip=("lm_head", "down_proj")))
    recipe = replace(recipe, merge=replace(recipe.merge, method="awq"))
    found = QtuneExporter().quant(recipe)
    assert (found.format, found.method, found.skip) == ("nf4", "awq", ("lm_head", "down_proj"))


def test_a_method_that_measures_needs_text(train: Callable[..., Trained], tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"merge\.method: nearest"),
        requantized(train(), Quant(format="int4", method="gptq"), tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_asked_first(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: full)
    with (
        pytest.raises(UserError, match="too small"),
        requantized(train(), Quant(), tmp_path),
    ):
        pass
