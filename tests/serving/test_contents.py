"""Files of a folder against what was written of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtune.export.folder import fingerprint
from qtune.serving.contents import differences


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.q.weight": torch.full((4,), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "LICENSE").write_text("free\n")
    return tmp_path


@pytest.fixture
def manifest(folder: Path) -> dict[str, Any]:
    made: dict[str, Callable[[Path], Any]] = {
        "files": fingerprint.files, "configs": fingerprint.configs, "modules": fingerprint.modules,
    }  # fmt: skip
    return {name: of(folder) for name, of in made.items()}


def test_nothing_differs_in_what_was_written(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "README.md").write_text("people edit it")
    (folder / ".gitattributes").write_text("the hub adds it")
    assert differences(folder, manifest) == []


@pytest.mark.parametrize(("name", "breaks"), [("tokenizer.json", True), ("LICENSE", False)])
def test_missing_file(name: str, breaks: bool, folder: Path, manifest: dict[str, Any]) -> None:
    (folder / name).unlink()
    (found,) = differences(folder, manifest)
    assert (found.where, found.what, found.breaks) == (name, "is missing", breaks)


def test_changed_and_new_files(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text("[]")
    (folder / "LICENSE").write_text("not free\n")
    (folder / "other.json").write_text("{}")
    assert sorted(map(str, differences(folder, manifest))) == [
        "LICENSE: has 9 bytes, and had 5",
        "other.json: was not there",
        "tokenizer.json: has changed",
    ]


def test_changed_modules_are_named_and_then_counted(folder: Path, manifest: dict[str, Any]) -> None:
    tensors = {f"layers.{i}.q.weight": torch.full((4,), i + 0.5) for i in range(7)}
    save_file(tensors | {"new.weight": torch.ones(1)}, folder / "model.safetensors")
    found = differences(folder, manifest)
    assert [str(difference) for difference in found] == [
        *(f"layers.{i}.q: tensors have changed" for i in range(5)),
        "weights: tensors have changed in 2 more modules",
        "layers.7.q: tensors are missing",
        "new: tensors were not there",
    ]
    assert [difference.breaks for difference in found] == [False] * 6 + [True, False]


def test_same_tensors_in_other_files_are_no_difference(
    folder: Path, manifest: dict[str, Any]
) -> None:
    (folder / "model.safetensors").unlink()
    for i in range(8):
        tensors = {f"layers.{i}.q.weight": torch.full((4,), float(i))}
        save_file(tensors, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert differences(folder, manifest) == []


def test_configuration_that_nobody_can_read(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "config.json").write_text("{")
    (found,) = differences(folder, manifest)
    assert found.where == "config.json" and "is not valid JSON" in found.what and found.breaks
