"""What bitsandbytes makes of the int8 folder, against what it would compute itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune.export.bitsandbytes_int8 import EXPORTERS, layer_tensors
from qtune.export.exporter import Trained, export
from qtune.export.folder.dense import dense_tensors
from qtune.export.folder.load import NotInstalled
from qtune.export.verify import check_logits, reload
from qtune.model.merge import quant_layers
from qtune.recipe import Quant

NAME = "bitsandbytes-int8"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def test_codes_are_those_of_bitsandbytes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16()
    weight[3] = 0
    found = dict(layer_tensors("p.", weight))
    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    rows = largest > 0
    assert torch.equal(found["p.weight"][rows], codes[rows])
    assert torch.equal(found["p.SCB"], largest) and found["p.SCB"].dtype == torch.float32
    assert (found["p.weight"][3] == 0).all()
    assert (found["p.weight_format"].dtype, found["p.weight_format"].item()) == (torch.uint8, 0)


@pytest.mark.parametrize("skip", [("lm_head",), ("lm_head", "k_proj")])
def test_consumer_reads_codes_and_scales(
    skip: tuple[str, ...], train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = train("qwen2", quant=Quant(skip=skip))
    trained = replace(trained, form="merged", onto="dequantized")
    folder = export(NAME, trained, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": CPU})
    found = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt)
    }
    assert found.keys() == quant_layers(trained.model).keys()
    stored, merged = load_file(folder / "model.safetensors"), dict(dense_tensors(trained))
    for name, layer in found.items():
        weight = layer.weight.data.float() * layer.weight.SCB.unsqueeze(1) / 127
        step = layer.weight.SCB.max() / 127
        assert (weight - merged[name].float()).abs().max() <= 0.501 * step
        assert torch.equal(layer.weight.data, stored[name])
    assert torch.equal(stored["lm_head.weight"], merged["lm_head.weight"])
    again = reload(NAME, folder, trained.base_folder, CPU)
    assert check_logits(again, trained.model, rows, max_change=0.08).top1 > 0.9


def test_missing_bitsandbytes_is_told(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.export.bitsandbytes_int8.find_spec", lambda _: None)
    (problem,) = EXPORTERS[NAME].check(train().recipe, "merged")
    assert "pip install bitsandbytes, or leave this export out" in problem
    with pytest.raises(NotInstalled, match="pip install bitsandbytes"):
        EXPORTERS[NAME].load(tmp_path, tmp_path, CPU)
