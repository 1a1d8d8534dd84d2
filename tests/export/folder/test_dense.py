"""What exports of the merge have in common."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtune.export.exporter import Trained
from qtune.export.folder.dense import (
    dense_bytes,
    dense_config,
    dense_dtype,
    dense_tensors,
    form_of,
)
from qtune.model.merge import merged_tensors
from qtune.recipe import Lora


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_tensors_are_those_of_the_merge(onto: str, train: Callable[..., Trained]) -> None:
    trained = replace(train("qwen2"), onto=onto)
    expected = dict(merged_tensors(trained.base_folder, trained.model, trained.onto))
    found = dict(dense_tensors(trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert form_of(trained) == {"form": "merged", "onto": onto}
    size = sum(tensor.nbytes for tensor in found.values())
    assert size <= dense_bytes(trained) < 1.1 * size + 10_000


def test_dtype_is_the_bases_own_but_for_float32(
    train: Callable[..., Trained], write_base: Callable[..., Path], tmp_path: Path
) -> None:
    expected = {torch.float32: torch.bfloat16, torch.float16: torch.float16}
    for stored, dtype in expected.items():
        trained = train(base=write_base(tmp_path / str(stored), "llama", stored))
        assert dense_dtype(trained) == dtype
        assert {tensor.dtype for _, tensor in dense_tensors(trained)} == {dtype}


def test_untied_head_is_told(train: Callable[..., Trained]) -> None:
    assert dense_config(train(), torch.float16) == {"dtype": "float16"}
    with pytest.warns(UserWarning, match="tie"):
        trained = train("llama", lora=Lora(rank=4, modules_to_save=("lm_head",)))
    found = dense_config(trained, torch.bfloat16)
    assert found == {"dtype": "bfloat16", "tie_word_embeddings": False}
