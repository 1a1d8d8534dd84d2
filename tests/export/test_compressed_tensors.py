"""What transformers and compressed-tensors decode from an exported folder, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune.data.calibration import Text
from qtune.export.compressed_tensors import EXPORTERS, packed_tensors, rows_tensors
from qtune.export.exporter import Trained, export
from qtune.export.folder.dense import dense_tensors
from qtune.export.verify import check_logits, reload
from qtune.model.merge import quant_layers
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Merge, Quant

pytest.importorskip("compressed_tensors")
CPU = torch.device("cpu")


def plainly_loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model as anybody loads it, after one forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "family", "quant"),
    [
        ("compressed-tensors-w4a16", "llama", Quant(format="int4_sym")),
        ("compressed-tensors-w4a16", "qwen2", Quant(format="int4")),
        ("compressed-tensors-w4a16", "llama", Quant(format="int4", group_size="row")),
        ("compressed-tensors-w8a16", "qwen2", Quant(format="int8", group_size=32)),
        ("compressed-tensors-w8a16", "llama", Quant(format="int8", group_size="row")),
    ],
)
def test_pair_decodes_to_the_weights_of_training(
    name: str, family: str, quant: Quant, train: Callable[..., Trained],
    rows: list[list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    trained = train(family, quant=quant)
    folder = export(name, trained, tmp_path / "out")
    found, layers = plainly_loaded(folder), quant_layers(trained.model)
    for path, layer in layers.items():
        assert torch.equal(found[path], layer.dequantize()), path
    stored, base = (load_file(p / "model.safetensors") for p in (folder, trained.base_folder))
    dense = [path for path in base if path not in layers]
    assert dense and all(torch.equal(stored[path], base[path]) for path in dense)
    again = reload(name, folder, trained.base_folder, CPU)
    assert check_logits(again, trained.model, rows, max_change=0.03).top1 > 0.9
    written = json.loads((folder / "qtune.json").read_text())
    assert (written["form"], written["vllm"]) == ("pair", [])


def test_bfloat16_scales_would_not_do(train: Callable[..., Trained]) -> None:
    layer = next(iter(quant_layers(train(quant=Quant(format="int8")).model).values()))
    found = dict(packed_tensors(("int8",), "p.", layer))
    scales = found["p.weight_scale"]
    assert scales.dtype == torch.float32
    assert not torch.equal(scales.bfloat16().float(), scales)
    assert found["p.weight_shape"].tolist() == list(layer.shape)
    assert "p.weight_zero_point" not in found, "vLLM has none for symmetric codes"


@pytest.mark.parametrize(
    ("name", "limit"), [("compressed-tensors-w8a8", 0.1), ("compressed-tensors-fp8", 0.2)]
)
def test_rows_are_quantized_once_from_the_merge(
    name: str, limit: float, train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = replace(train("qwen2"), form="merged", onto="dequantized")
    folder = export(name, trained, tmp_path / "out")
    found, merged = plainly_loaded(folder), dict(dense_tensors(trained))
    kind = EXPORTERS[name].kind
    for path in quant_layers(trained.model):
        expected = dict(rows_tensors(kind, "", merged[path]))
        weight = (expected["weight"].float() * expected["weight_scale"].float()).bfloat16()
        assert torch.equal(found[path], weight), path
    assert torch.equal(found["lm_head.weight"], merged["lm_head.weight"])
    again = reload(name, folder, trained.base_folder, CPU)
    agreement = check_logits(again, trained.model, rows, max_change=limit)
    # weights alone change less than half of that: inputs are rounded too
    assert agreement.change > 0.02


@pytest.mark.parametrize("name", ["compressed-tensors-w8a16", "compressed-tensors-w8a8"])
def test_keys_and_values_are_rounded_with_the_written_scales(
    name: str, train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train(quant=Quant(format="int8"))
    form: Any = EXPORTERS[name].forms[0]
    plain = replace(trained, form=form, onto="dequantized")
    recipe = replace(trained.recipe, merge=Merge(kv_scales=True))
    scaled = replace(plain, recipe=recipe, text=lambda: Text(rows, "rows"))
    folder = export(name, scaled, tmp_path / "scaled")
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.self_attn.v_scale"].shape == (1,)
    assert json.loads((folder / "qtune.json").read_text())["exact"] is False
    without = reload(name, export(name, plain, tmp_path / "plain"), trained.base_folder, CPU)
    model = reload(name, folder, trained.base_folder, CPU)
    change = check_logits(model, without, rows, max_change=0.1).change
    assert change > 0.005, "three bits of digits lose more than that"


@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_missing_library_is_told(
    name: str, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.export.consumers.compressed_tensors.find_spec", lambda _: None)
    recipe = replace(train().recipe, quant=Quant(format="int8" if "w8" in name else "int4"))
    (problem,) = EXPORTERS[name].check(recipe, EXPORTERS[name].forms[0])
    assert "pip install compressed-tensors, or leave this export out" in problem


def test_merged_weights_have_no_zero_points(train: Callable[..., Trained]) -> None:
    recipe = train().recipe
    found = {name: exporter.quant(recipe) for name, exporter in EXPORTERS.items()}
    formats = {name: quant and quant.format for name, quant in found.items()}
    assert formats == {
        "compressed-tensors-w4a16": "int4_sym",
        "compressed-tensors-w8a16": "int8",
        "compressed-tensors-w8a8": None,
        "compressed-tensors-fp8": None,
    }


def test_zero_points_are_packed_along_outputs() -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(torch.nn.Linear(128, 32), Storage("int4"))
    found = dict(packed_tensors(("int4",), "", layer))
    assert found["weight_zero_point"].shape == (4, 2)
    assert found["weight_packed"].shape == (32, 16)


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("compressed-tensors-w4a16", Storage("int4_sym")),
        ("compressed-tensors-w8a16", Storage("int8")),
    ],
)
def test_merged_form_holds_the_codes_of_the_merge(
    name: str, storage: Storage, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train("qwen2"), form="merged")
    nearest = replace(trained.recipe, merge=Merge(method="nearest"))
    folder = export(name, replace(trained, recipe=nearest), tmp_path / "out")
    assert not (folder / "adapter").exists()
    found, merged = plainly_loaded(folder), dict(dense_tensors(trained))
    for path in quant_layers(trained.model):
        dense = torch.nn.Linear(*reversed(merged[path].shape), bias=False, dtype=torch.bfloat16)
        dense.weight.data = merged[path]
        assert torch.equal(found[path], QuantLinear.from_linear(dense, storage).dequantize()), path
