"""Which layers a quantized export has in few bits, in either form."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtune.export.exporter import Trained, export
from qtune.export.folder.quantized import (
    config_changes,
    dense_linears,
    form_of,
    quantized_bytes,
    quantized_weights,
)
from qtune.model.merge import merged_tensors
from qtune.quant.linear import QuantLinear
from qtune.recipe import Merge, Quant


@pytest.mark.parametrize("skip", [("lm_head",), ("lm_head", "down_proj"), ()])
def test_layers_without_quantization_follow_the_recipe_too(
    skip: tuple[str, ...], train: Callable[..., Trained]
) -> None:
    quantized = train("qwen2", quant=Quant(skip=skip))
    dense = train("qwen2", quant=Quant(format=None, skip=skip))
    assert quantized_weights(quantized) == quantized_weights(dense)
    assert dense_linears(quantized) == dense_linears(dense)
    # the output layer is never quantized
    expected = {"lm_head"}
    if "down_proj" in skip:
        expected |= {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(dense_linears(dense)) == expected
    assert len(quantized_weights(dense)) == 15 - len(expected)


def test_merged_form_is_quantized_once_from_the_original_merge(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train("qwen2"), form="merged", onto="dequantized")
    nearest = replace(trained.recipe, merge=Merge(method="nearest"))
    trained = replace(trained, recipe=nearest)
    stored = load_file(export("qtune", trained, tmp_path / "out") / "model.safetensors")
    merged = dict(merged_tensors(trained.base_folder, trained.model, "original"))
    name = "model.layers.1.mlp.up_proj.weight"
    dense = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    dense.weight = torch.nn.Parameter(merged[name])
    layer = QuantLinear.from_linear(dense)
    assert torch.equal(stored[name], layer.weight)
    assert torch.equal(stored["model.norm.weight"], merged["model.norm.weight"])
    assert torch.equal(stored["lm_head.weight"], merged["lm_head.weight"])


def test_duplicate_of_a_tied_tensor_is_left_out(
    train: Callable[..., Trained], write_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = export("qtune", train(base=base), tmp_path / "out")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_config_says_the_dtype_and_the_manifest_the_form(train: Callable[..., Trained]) -> None:
    trained = train("llama")
    assert config_changes(trained) == {"dtype": "bfloat16"}
    assert form_of(trained) == {"form": "pair"}
    made = {"form": "merged", "onto": "original", "method": "nearest"}
    assert form_of(replace(trained, form="merged")) == made


def test_bytes_are_those_of_codes_and_adapter(train: Callable[..., Trained]) -> None:
    four, sixteen = train("qwen2"), train("qwen2", quant=Quant(format=None))
    assert quantized_bytes(four) < 0.7 * quantized_bytes(sixteen)
