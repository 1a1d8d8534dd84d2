"""Folders of GPTQ, decoded by a reader written here from the layout's description.

gptqmodel, their consumer, is too heavy for these tests; where it is installed it is asked as well.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtune.errors import UserError
from qtune.export.exporter import Trained, export
from qtune.export.gptq import EXPORTERS
from qtune.export.verify import check_logits, reload
from qtune.model.merge import quant_layers
from qtune.recipe import Quant

CPU = torch.device("cpu")


def fields(words: Tensor, bits: int, dim: int) -> Tensor:
    """The numbers in words of a matrix, the lowest first, in place of the words along `dim`."""
    places = [words >> bits * place & (1 << bits) - 1 for place in range(32 // bits)]
    return torch.stack(places, dim + 1).flatten(dim, dim + 1)


def decoded(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """The weight [O, I] in float32, as version 1 of the layout defines it."""
    parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    assert [str(part.dtype) for part in parts.values()] == [
        "torch.int32", "torch.int32", "torch.float16", "torch.int32",
    ]  # fmt: skip
    groups = parts["g_idx"].long()
    zeros = fields(parts["qzeros"], bits, 1) + 1
    codes = fields(parts["qweight"], bits, 0)
    return ((codes - zeros[groups]) * parts["scales"].float()[groups]).T


@pytest.mark.parametrize(
    ("name", "family", "quant"),
    [
        ("gptq", "llama", Quant(format="int4_sym")),
        ("gptq", "qwen2", Quant(format="int4_sym", group_size="row")),
        ("gptq-int8", "qwen2", Quant(format="int8", group_size=32)),
        ("gptq-int8", "llama", Quant(format="int8", group_size="row")),
    ],
)
def test_pair_decodes_to_the_weights_of_training(
    name: str, family: str, quant: Quant, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(family, quant=quant)
    folder = export(name, trained, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    layers, base = quant_layers(trained.model), load_file(trained.base_folder / "model.safetensors")
    for path, layer in layers.items():
        bits = EXPORTERS[name].bits
        weight = decoded(stored, path.removesuffix(".weight"), bits)
        assert torch.equal(weight, layer.dequantize(torch.float32)), path
        assert path not in stored
    dense = base.keys() - layers.keys()
    assert dense and all(torch.equal(stored[path], base[path]) for path in dense)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "gptq", "bits": EXPORTERS[name].bits, "desc_act": False, "sym": True,
        "group_size": -1 if quant.group_size == "row" else quant.group_size, "lm_head": False,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_layers_in_16_bits_are_told_by_kind(train: Callable[..., Trained]) -> None:
    trained = train(quant=Quant(format="int4_sym", skip=("lm_head", "k_proj", "mlp.up_proj")))
    config = EXPORTERS["gptq"].quant_config(trained)
    assert config["modules_in_block_to_quantize"] == [
        ["mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj",
         "self_attn.v_proj"]
    ]  # fmt: skip
    odd = train(quant=Quant(format="int4_sym", skip=("lm_head", "layers.0.self_attn.k_proj")))
    with pytest.raises(UserError, match=r"self_attn.k_proj is in 16 bits in some blocks only"):
        EXPORTERS["gptq"].quant_config(odd)


def test_zero_points_are_refused_with_the_way_out(train: Callable[..., Trained]) -> None:
    recipe = replace(train().recipe, quant=Quant(format="int4"))
    (problem,) = EXPORTERS["gptq"].check(recipe)
    assert "set quant.format: int4_sym, export awq or compressed-tensors-w4a16" in problem
    assert EXPORTERS["gptq"].check(recipe, "merged") == []
    (problem,) = EXPORTERS["gptq-int8"].check(recipe)
    assert "it holds int8 and quant.format is int4; set quant.format: int8" in problem


def test_merged_weights_are_quantized_to_its_own_format(train: Callable[..., Trained]) -> None:
    recipe = train().recipe
    found = {name: exporter.quant(recipe) for name, exporter in EXPORTERS.items()}
    assert {name: (quant.format, quant.method) for name, quant in found.items()} == {
        "gptq": ("int4_sym", "gptq"),
        "gptq-int8": ("int8", "gptq"),
    }


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is here")
def test_missing_consumer_is_told(train: Callable[..., Trained], tmp_path: Path) -> None:
    folder = export("gptq", train(quant=Quant(format="int4_sym")), tmp_path / "gptq")
    with pytest.raises(UserError, match="missing: gptqmodel, optimum; pip install"):
        reload("gptq", folder, tmp_path, CPU)


def test_consumer_computes_the_same(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    trained = train(quant=Quant(format="int4_sym"))
    folder = export("gptq", trained, tmp_path / "gptq")
    model = reload("gptq", folder, trained.base_folder, CPU)
    assert check_logits(model, trained.model, rows, max_change=0.03).top1 > 0.9
