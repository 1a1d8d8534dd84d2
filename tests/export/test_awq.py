"""Folders of AWQ, decoded by a reader written here from the layout's description.

gptqmodel, their consumer, is too heavy for these tests; where it is installed it is asked as well.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtune.export.awq import AwqExporter
from qtune.export.exporter import Trained, export
from qtune.export.verify import check_logits, reload
from qtune.model.merge import quant_layers
from qtune.recipe import Merge, Quant

CPU = torch.device("cpu")
# where each output of eight lies in a word, which is the order of the layout backwards
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def outputs(words: Tensor) -> Tensor:
    """Numbers [N, O] of words [N, O/8]."""
    every = torch.stack([words >> 4 * place & 15 for place in PLACES], -1)
    return every.flatten(1)


def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The weight [O, I] in float32."""
    codes, zeros = (outputs(tensors[f"{name}.{leaf}"]) for leaf in ("qweight", "qzeros"))
    scales = tensors[f"{name}.scales"]
    assert scales.dtype == torch.float16
    size = len(codes) // len(scales)
    steps = codes - zeros.repeat_interleave(size, 0)
    return (steps * scales.float().repeat_interleave(size, 0)).T


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("llama", Quant(format="int4")),
        ("qwen2", Quant(format="int4", group_size="row")),
        ("qwen2", Quant(format="int4_sym", group_size=32, skip=("lm_head", "k_proj"))),
    ],
)
def test_pair_decodes_to_the_weights_of_training(
    family: str, quant: Quant, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(family, quant=quant)
    folder = export("awq", trained, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    layers, base = quant_layers(trained.model), load_file(trained.base_folder / "model.safetensors")
    for path, layer in layers.items():
        weight = decoded(stored, path.removesuffix(".weight"))
        assert torch.equal(weight, layer.dequantize(torch.float32)), path
    dense = base.keys() - layers.keys()
    assert dense and all(torch.equal(stored[path], base[path]) for path in dense)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = [name for name in sorted(dense) if "k_proj.weight" in name]
    assert config == {
        "quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm",
        "group_size": -1 if quant.group_size == "row" else quant.group_size,
        "modules_to_not_convert": ["lm_head", *(name[: -len(".weight")] for name in skipped)],
    }  # fmt: skip
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_what_it_holds(train: Callable[..., Trained]) -> None:
    recipe, exporter = train().recipe, AwqExporter()
    for known in ("int4", "int4_sym"):
        assert exporter.check(replace(recipe, quant=Quant(format=known))) == []
    (problem,) = exporter.check(recipe)
    assert "it holds int4 or int4_sym and quant.format is nf4; set quant.format: int4" in problem
    quant = exporter.quant(replace(recipe, merge=Merge(method="awq")))
    assert (quant.format, quant.method, quant.group_size) == ("int4", "awq", 64)


def test_consumer_computes_the_same(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    trained = train(quant=Quant(format="int4"))
    folder = export("awq", trained, tmp_path / "awq")
    model = reload("awq", folder, trained.base_folder, CPU)
    assert check_logits(model, trained.model, rows, max_change=0.03).top1 > 0.9
