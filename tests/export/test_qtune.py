"""Our own folder: the very codes, and loading it with transformers and `import qtune` alone."""

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
from qtune.export.exporter import Trained, export
from qtune.export.qtune import QtuneExporter
from qtune.export.verify import check_logits, reload
from qtune.model.merge import quant_layers
from qtune.model.quant_config import QtuneConfig
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Lora, Merge, MethodName, Quant

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "quant",
    [
        Quant(),
        Quant(format="int8", group_size=32),
        Quant(format="int3", group_size="row", layers={"up_proj": "lm2"}),
    ],
    ids=["nf4", "int8", "mixed"],
)
def test_pair_is_exactly_the_trained_model(
    quant: Quant, train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    lora = Lora(rank=4, alpha=8, target_modules=("q_proj", "up_proj"), modules_to_save=("lm_head",))
    trained = train("qwen2", quant=quant, lora=lora)
    folder = export("qtune", trained, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    for name, layer in quant_layers(trained.model).items():
        for leaf in layer.tensor_names:
            assert torch.equal(stored[name.removesuffix("weight") + leaf], getattr(layer, leaf))
    model = reload("qtune", folder, trained.base_folder, CPU)
    assert check_logits(model, trained.model, rows, max_change=0).kl == pytest.approx(0, abs=1e-6)


def test_config_tells_the_loader_what_to_do(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train("llama", quant=Quant(group_size=32, skip=("lm_head", "down_proj")))
    folder = export("qtune", trained, tmp_path / "out")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    said = QtuneConfig(**config["quantization_config"])
    assert config["quantization_config"]["quant_method"] == "qtune"
    assert (said.skip, said.storage("up_proj")) == (["lm_head", "down_proj"], Storage("nf4", 32))
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU})
    layers = model.model.layers[0].mlp
    assert isinstance(layers.up_proj, QuantLinear) and layers.up_proj.group_size == 32
    assert type(layers.down_proj) is torch.nn.Linear
    assert json.loads((folder / "qtune.json").read_text())["form"] == "pair"


def test_exported_base_can_be_trained_and_exported_again(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train("llama")
    first = export("qtune", trained, tmp_path / "first")
    again = train("llama", quant=Quant(format=None), base=first)
    again = replace(again, recipe=replace(again.recipe, quant=Quant()))
    second = export("qtune", again, tmp_path / "second")
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    model = reload("qtune", second, first, CPU)
    check_logits(model, again.model, rows, max_change=0)


def test_float32_base_is_stored_in_16_bits(
    train: Callable[..., Trained], write_base: Callable[..., Path], rows: Any, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama", torch.float32)
    trained = train(base=base)
    folder = export("qtune", trained, tmp_path / "out")
    assert torch.float32 not in {t.dtype for t in load_file(folder / "model.safetensors").values()}
    check_logits(reload("qtune", folder, base, CPU), trained.model, rows, max_change=0)


def merged(trained: Trained, **merge: Any) -> Trained:
    recipe = replace(trained.recipe, merge=Merge(**merge))
    return replace(trained, recipe=recipe, form="merged")


def test_merged_form_of_a_run_in_16_bits_is_nf4(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = merged(train("llama", quant=Quant(format=None)), method="nearest")
    folder = export("qtune", trained, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nf4"
    said = json.loads((folder / "qtune.json").read_text())
    assert (said["form"], said["onto"], said["method"]) == ("merged", "original", "nearest")
    model = reload("qtune", folder, trained.base_folder, CPU)
    assert sum(isinstance(layer, QuantLinear) for layer in model.modules()) == 14


def test_pair_without_a_quantized_base_is_refused(train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, quant=Quant(format=None))
    (problem,) = QtuneExporter().check(recipe)
    assert "export bf16 or the merged form" in problem
    assert QtuneExporter().check(recipe, "merged") == []


@pytest.mark.parametrize(("method", "rotates"), [("nearest", False), ("gptq", True)])
def test_merged_form_has_the_formats_of_the_base(
    method: MethodName, rotates: bool, train: Callable[..., Trained], tmp_path: Path
) -> None:
    quant = Quant(format="int4", method="gptq", rotate=True, layers={"q_proj": "nf4"})
    trained = replace(train("llama"), text=lambda: Text([list(range(3, 67))] * 4, "made up"))
    trained = replace(trained, recipe=replace(trained.recipe, quant=quant))
    folder = export("qtune", merged(trained, method=method), tmp_path / "out")
    model = reload("qtune", folder, trained.base_folder, CPU)
    attention = model.get_submodule("model.layers.0.self_attn")
    stored = {name: attention.get_submodule(name).storage for name in ("q_proj", "k_proj")}
    assert stored == {
        "q_proj": Storage("nf4", rotated=rotates),
        "k_proj": Storage("int4", rotated=rotates),
    }


def test_merged_form_of_e8p_needs_the_method_that_finds_it(train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, quant=Quant(format="e8p", method="gptq"))
    nearest = replace(recipe, merge=Merge(method="nearest"))
    assert QtuneExporter().check(recipe, "merged") == QtuneExporter().check(nearest) == []
    assert QtuneExporter().check(nearest, "merged") == ["e8p needs merge.method: gptq"]
    assert QtuneExporter().quant(recipe).format == "e8p"
