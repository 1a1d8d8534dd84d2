"""Shards as safetensors and transformers read them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtune.errors import UserError
from qtune.model.shards import write_shards

TENSORS = {f"t{i}": torch.arange(10.0) + i for i in range(5)} | {"wide": torch.ones(3, 4).T}


def test_one_file_if_all_fits(tmp_path: Path) -> None:
    assert write_shards(iter(TENSORS.items()), tmp_path) == 5 * 40 + 48
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)


def test_shards_stay_below_the_limit_and_the_index_finds_all(tmp_path: Path) -> None:
    write_shards(iter(TENSORS.items()), tmp_path, shard_bytes=90)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 248}
    files = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert {p.name for p in tmp_path.iterdir()} == files | {"model.safetensors.index.json"}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 90


def test_tensor_above_the_limit_gets_its_own_shard(tmp_path: Path) -> None:
    write_shards(iter(TENSORS.items()), tmp_path, shard_bytes=1)
    assert len(list(tmp_path.glob("*-of-00006.safetensors"))) == 6


def test_transformers_loads_shards(tiny_model: Path, tmp_path: Path) -> None:
    for path in tiny_model.glob("*.json"):
        shutil.copy(path, tmp_path)
    whole = load_file(tiny_model / "model.safetensors")
    write_shards(iter(whole.items()), tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_at_most_one_shard_is_in_memory(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(5):
            yield f"t{i}", torch.zeros(10)
            written = len(list(tmp_path.glob("*.safetensors")))
            assert written >= i // 2

    write_shards(tensors(), tmp_path, shard_bytes=80)


def test_same_name_twice_is_a_defect(tmp_path: Path) -> None:
    pairs = [("a", torch.zeros(10)), ("b", torch.zeros(10)), ("a", torch.zeros(10))]
    with pytest.raises(AssertionError, match="a is written twice"):
        write_shards(iter(pairs), tmp_path, shard_bytes=40)


def test_disk_that_takes_no_more_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_shards(iter(TENSORS.items()), tmp_path / "missing")
