"""Keys and folders are found where they get to, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtune.serving.secrets import found

MANIFEST: dict[str, Any] = {"export": "bf16", "base": {"model": "org/model", "revision": None}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qtune.json").write_text(json.dumps(MANIFEST))
    return tmp_path


def test_plain_folder_is_clean(folder: Path) -> None:
    golden = [{"text": "/etc/passwd", "messages": [{"content": "/home/me"}]}]
    (folder / "qtune.json").write_text(json.dumps(MANIFEST | {"golden": golden}))
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {"/usr/bin": 1}}))
    config = {"_name_or_path": "org/model", "a": "a/b", "b": "//", "c": "/ ", "d": "see /usr/bin"}
    (folder / "config.json").write_text(json.dumps(config))
    assert found(folder) == []


@pytest.mark.parametrize("path", ["/home/me/model", "~/model", "/model", "C:\\models\\x"])
def test_folders_of_this_machine(path: str, folder: Path) -> None:
    (folder / "adapter").mkdir()
    config = {"base_model_name_or_path": path, "nested": [{"x": path}]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "qtune.json").write_text(json.dumps(MANIFEST | {"base": {"model": path}}))
    what, inner = f"is a folder of this machine: {json.dumps(path)}", "adapter/adapter_config.json"
    assert sorted(str(difference) for difference in found(folder)) == [
        f"{inner}: base_model_name_or_path {what}",
        f"{inner}: nested[0].x {what}",
        f"qtune.json: base.model {what}",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "hf_" + "aB3" * 12,
        "sk-proj-" + "aB3_" * 10,
        "ghp_" + "a1" * 18,
        "AKIA" + "AB12" * 4,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_keys_are_found_and_not_repeated(key: str, folder: Path) -> None:
    (folder / "notes.md").write_text(f"a\nkey={key}\n")
    (difference,) = found(folder)
    assert difference.where == "notes.md" and key not in difference.what


@pytest.mark.parametrize("text", ["hf_short", "sk-learn", "task-force-" + "a" * 40, "AKIAX"])
def test_words_are_no_keys(text: str, folder: Path) -> None:
    (folder / "notes.md").write_text(text)
    assert found(folder) == []
