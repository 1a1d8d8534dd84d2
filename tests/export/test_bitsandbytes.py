"""What bitsandbytes decodes from an exported folder, bit for bit."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.errors import UserError
from qtune.export.bitsandbytes import BitsandbytesExporter, layer_tensors
from qtune.export.exporter import Trained, export
from qtune.model.load import add_adapter, load_base
from qtune.model.merge import quant_layers
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage
from qtune.recipe import Lora, Quant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """bitsandbytes compiles its plain decoder, which takes longer than all tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def decoded(model: Any) -> dict[str, torch.Tensor]:
    """The weights of all bitsandbytes layers, by its own decoder, before any forward pass."""
    return {
        f"{name}.weight": bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("llama", Quant()),
        ("qwen2", Quant(group_size=128)),
        ("llama", Quant(format="fp4")),
        ("qwen2", Quant(format="fp4", group_size=128)),
    ],
)
def test_pair_decodes_to_the_weights_of_training(
    family: str, quant: Quant, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(family, quant=quant)
    folder = export("bitsandbytes", trained, tmp_path / "out")
    found = decoded(AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU}))
    layers = quant_layers(trained.model)
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], layer.dequantize()), name
    stored, base = (load_file(p / "model.safetensors") for p in (folder, trained.base_folder))
    dense = [name for name in base if name not in layers]
    assert dense and all(torch.equal(stored[name], base[name]) for name in dense)


def test_merged_form_is_the_original_merge_quantized_once(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train("qwen2", quant=Quant(format="int8")), form="merged", onto="dequantized")
    merged = export("bf16", replace(trained, onto="original"), tmp_path / "bf16")
    dense = load_file(merged / "model.safetensors")
    folder = export("bitsandbytes", trained, tmp_path / "out")
    assert json.loads((folder / "qtune.json").read_text())["onto"] == "original"
    found = decoded(AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU}))
    assert found.keys() == quant_layers(trained.model).keys()
    for name, weight in found.items():
        own = bitsandbytes.functional.quantize_4bit(dense[name], quant_type="nf4")
        again = bitsandbytes.functional.dequantize_4bit(*own)
        # scales are in 8 bits here and in 32 there
        assert (weight - again).norm() < 0.03 * again.norm()


def test_run_in_16_bits_exports_the_same_layers(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train("llama", quant=Quant(format=None)), form="merged")
    folder = export("bitsandbytes", trained, tmp_path / "out")
    found = decoded(AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU}))
    quantized = quant_layers(train("llama").model)
    assert found.keys() == quantized.keys()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 67, 100])
def test_any_shape_is_lossless(width: int, name: str) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(width, 33, bias=False, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(dense, Storage(name))
    tensors = dict(layer_tensors("p.", layer))
    parts = {name.removeprefix("p.weight."): t for name, t in tensors.items() if name != "p.weight"}
    state = bitsandbytes.functional.QuantState.from_dict(parts, device=CPU)
    found = bitsandbytes.functional.dequantize_4bit(tensors["p.weight"], state)
    assert torch.equal(found, layer.dequantize())


def test_layers_in_16_bits_are_named(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train("qwen2", quant=Quant(skip=("lm_head", "k_proj")))
    folder = export("bitsandbytes", trained, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = {f"model.layers.{i}.self_attn.k_proj" for i in range(2)} | {"lm_head"}
    assert set(config["llm_int8_skip_modules"]) == names
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU})
    assert decoded(model).keys() == quant_layers(trained.model).keys()


@pytest.mark.parametrize(
    ("quant", "fix"),
    [
        (Quant(format="int8"), "quant.format is int8; train with nf4, or export the merged form"),
        (Quant(layers={"down_proj": "int8"}), "leave quant.layers out"),
        (Quant(method="gptq", rotate=True), "set quant.rotate: false"),
        (Quant(method="awq"), "set quant.method: gptq"),
        (Quant(group_size="row"), "quant.group_size row is not one of 64"),
        (Quant(format=None), "quant.format is null"),
        (Quant(group_size=32), "take 64, or export the merged form"),
    ],
)
def test_check_says_what_to_do(quant: Quant, fix: str, train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, quant=quant)
    exporter = BitsandbytesExporter()
    (problem,) = exporter.check(recipe)
    assert fix in problem
    assert exporter.check(recipe, "merged") == []


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="only these kernels are wrong"
)
def test_cpu_that_decodes_wrongly_is_named(
    train: Callable[..., Trained], tmp_path: Path, bases: dict[str, Path]
) -> None:
    config = AutoConfig.from_pretrained(bases["llama"])
    config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    trained = train()
    model = add_adapter(load_base(tmp_path / "b", Quant(), device=CPU), Lora(rank=4))
    odd = replace(trained, model=model, base_folder=tmp_path / "b")
    folder = export("bitsandbytes", odd, tmp_path / "out")
    with pytest.raises(UserError, match=r"down_proj wrongly: its 96 inputs"):
        BitsandbytesExporter().load(folder, tmp_path / "b", CPU)


def test_missing_bitsandbytes_is_told(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export("bitsandbytes", train(), tmp_path / "out")
    monkeypatch.setattr("qtune.export.bitsandbytes.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        BitsandbytesExporter().load(folder, tmp_path, CPU)
    (problem,) = BitsandbytesExporter().check(train().recipe)
    assert "pip install bitsandbytes, or leave this export out" in problem
