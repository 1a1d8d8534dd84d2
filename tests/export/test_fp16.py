"""The merge in float16: same numbers where it has them, a refusal where it has not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtune.errors import UserError
from qtune.export.exporter import Trained, export
from qtune.export.folder.dense import dense_tensors
from qtune.export.fp16 import checked
from qtune.export.verify import check_logits, reload
from qtune.model.merge import adapter_updates, quant_layers

CPU = torch.device("cpu")


def test_it_is_the_merge_in_another_dtype(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    trained = replace(train("qwen2"), form="merged", onto="dequantized")
    folder = export("fp16", trained, tmp_path / "fp16")
    stored, merged = (
        load_file(folder / "model.safetensors"),
        dict(dense_tensors(trained, torch.float16)),
    )
    assert stored.keys() == merged.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, merged[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16" and "quantization_config" not in config
    assert json.loads((folder / "qtune.json").read_text())["onto"] == "dequantized"
    model = reload("fp16", folder, trained.base_folder, CPU)
    assert model.dtype == torch.float16
    assert check_logits(model, trained.model, rows, max_change=0.03).top1 > 0.9


def test_sums_are_rounded_once(train: Callable[..., Trained]) -> None:
    trained = replace(train("qwen2"), onto="dequantized")
    updates, layers = adapter_updates(trained.model), quant_layers(trained.model)
    found = dict(dense_tensors(trained, torch.float16))
    for name, layer in layers.items():
        exact = updates[name](layer.dequantize(torch.float32))
        assert torch.equal(found[name], exact.half()), name
        assert not torch.equal(found[name], exact.bfloat16().half()), "bfloat16 would lose digits"


@pytest.mark.parametrize("value", [65536.0, -1e9])
def test_too_large_a_number_is_refused_by_name(value: float) -> None:
    fine, large = torch.tensor([65504.0]).half(), torch.tensor([1.0, value]).half()
    tensors = checked(iter({"a.weight": fine, "b.weight": large}.items()))
    name, tensor = next(tensors)
    assert name == "a.weight" and tensor.item() == 65504
    with pytest.raises(UserError, match=r"b\.weight: its largest number is beyond .* export bf16"):
        next(tensors)


def test_integers_pass_as_they_are() -> None:
    ((_, tensor),) = checked(iter([("a", torch.tensor([70000]))]))
    assert tensor.dtype == torch.int64
