"""Merged folders: their configuration and dtypes; the sums are tested with the merge."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtune.export.exporter import Trained, export
from qtune.export.verify import check_logits
from qtune.recipe import Lora


def test_config_names_the_dtype_and_no_quantization(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    folder = export("bf16", replace(train(), onto="dequantized"), tmp_path / "bf16")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] is True
    assert config["use_cache"] is True, "that it was off in training is nobody's business"
    assert "quantization_config" not in config and "torch_dtype" not in config
    manifest = json.loads((folder / "qtune.json").read_text())
    assert (manifest["form"], manifest["onto"]) == ("merged", "dequantized")


def test_float32_base_becomes_16_bits(
    train: Callable[..., Trained], write_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama", torch.float32)
    folder = export("bf16", train(base=base), tmp_path / "bf16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_untied_head_is_in_the_folder(
    train: Callable[..., Trained], rows: list[list[int]], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="tie"):
        trained = train("llama", lora=Lora(rank=4, alpha=8, modules_to_save=("lm_head",)))
    folder = export("bf16", replace(trained, onto="dequantized"), tmp_path / "bf16")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert check_logits(model, trained.model, rows, max_change=0.03).top1 > 0.9
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
