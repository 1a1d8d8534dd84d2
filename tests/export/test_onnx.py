"""The graph in ONNX Runtime, against the model that was trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.export.exporter import Trained, export, write_run_adapter
from qtune.export.folder.load import NotInstalled
from qtune.export.onnx import OnnxExporter
from qtune.export.verify import check_logits, reload
from qtune.model.adapt import adapt, load_trained
from qtune.model.load import load_base
from qtune.recipe import AdapterName, Lora, Merge, Quant, Scales

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CPU = torch.device("cpu")
# the graph computes in float32, the model in bfloat16
ROUNDING = 0.03


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "quant",
    [
        Quant(),
        Quant(format="int4", group_size=32),
        Quant(format="int4_sym", layers={"up_proj": "int8", "q_proj": "fp4", "o_proj": "int2"}),
    ],
    ids=["nf4", "int4", "mixed"],
)
def test_pair_is_exactly_the_trained_model(
    quant: Quant, family: str, train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train(family, quant=quant)
    folder = export("onnx", trained, tmp_path / "out")
    model = reload("onnx", folder, trained.base_folder, CPU)
    assert check_logits(model, trained.model.float(), rows, max_change=1e-4).top1 == 1


def test_trained_head_and_embeddings_are_in_it(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    lora = Lora(rank=4, alpha=8, rslora=True, modules_to_save=("lm_head", "embed_tokens"))
    trained = train("qwen2", lora=lora)
    model = reload("onnx", export("onnx", trained, tmp_path / "out"), trained.base_folder, CPU)
    check_logits(model, trained.model.float(), rows, max_change=1e-4)


@pytest.mark.parametrize("adapter", ["scales", "lora + scales", "qa-lora"])
def test_trained_scales_and_zero_points_are_in_it(
    adapter: AdapterName,
    train: Callable[..., Trained],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    trained = train("llama", quant=Quant(format="int4"))
    scales = Scales(zeros=adapter != "qa-lora")
    recipe = replace(trained.recipe, adapter=adapter, scales=scales)
    tuned = adapt(load_base(trained.base_folder, recipe.quant, device=CPU), recipe)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.01 if "scales" in name else 0.05) * torch.randn_like(parameter)
    write_run_adapter(tuned, tmp_path / "adapter", recipe.model)
    model = load_trained(
        load_base(trained.base_folder, recipe.quant, device=CPU), tmp_path / "adapter"
    )
    folder = export("onnx", replace(trained, recipe=recipe, model=model), tmp_path / "out")
    found = reload("onnx", folder, trained.base_folder, CPU)
    check_logits(found, model.float(), rows, max_change=1e-4)


def test_merged_form_has_integers(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = replace(train("llama", quant=Quant(format="lm4")), form="merged")
    text = lambda: Text([list(range(3, 67))] * 4, "made up")  # noqa: E731
    recipe = replace(trained.recipe, merge=Merge(method="gptq"))
    folder = export("onnx", replace(trained, text=text, recipe=recipe), tmp_path / "out")
    model = reload("onnx", folder, trained.base_folder, CPU)
    found = check_logits(model, trained.model, rows, max_change=1)
    assert found.change > ROUNDING
    assert json.loads((folder / "qtune.json").read_text())["form"] == "merged"


def test_settings_for_onnxruntime_genai(train: Callable[..., Trained], tmp_path: Path) -> None:
    folder = export("onnx", train("llama"), tmp_path / "out")
    said = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (said["type"], said["context_length"], said["vocab_size"]) == ("llama", 128, 320)
    assert said["eos_token_id"] == json.loads((folder / "qtune.json").read_text())["stop_ids"]
    decoder = said["decoder"]
    assert decoder["filename"] == "model.onnx" and decoder["num_key_value_heads"] == 2
    assert (folder / decoder["filename"]).is_file()


@pytest.mark.parametrize(
    ("quant", "lora", "problem"),
    [
        (Quant(format=None), Lora(), "null"),
        (Quant(format="lm4"), Lora(), "lm4"),
        (Quant(format="int4", layers={"q_proj": "lm2"}), Lora(), "lm2"),
        (Quant(group_size="row"), Lora(), "group_size row"),
        (Quant(format="int4", method="awq"), Lora(), "channel factors"),
        (Quant(format="int4", method="gptq", rotate=True), Lora(), "rotation"),
        (Quant(), Lora(dora=True), "DoRA"),
    ],
)
def test_pairs_that_it_cannot_hold_are_refused(
    quant: Quant, lora: Lora, problem: str, train: Callable[..., Trained]
) -> None:
    recipe = replace(train().recipe, quant=quant, lora=lora)
    (found,) = OnnxExporter().check(recipe)
    assert problem in found and "merged form" in found
    assert OnnxExporter().check(recipe, "merged") == []


def test_other_models_are_refused_by_name(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train("llama")
    FalconConfig().save_pretrained(tmp_path)
    (problem,) = OnnxExporter().check(replace(trained.recipe, model=str(tmp_path)))
    assert "falcon" in problem
    trained.base.config.model_type = "falcon"
    with pytest.raises(UserError, match="falcon"):
        export("onnx", trained, tmp_path / "out")


def test_missing_libraries_are_named(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> Any:
        return None

    monkeypatch.setattr("qtune.export.onnx.find_spec", find_spec)
    assert OnnxExporter().check(train().recipe) == [
        "onnx and onnxruntime missing: pip install qtune[onnx], or leave it out"
    ]
    with pytest.raises(NotInstalled, match="onnxruntime"):
        OnnxExporter().load(Path(), Path(), CPU)
