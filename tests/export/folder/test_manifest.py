"""qtune.json: its hashes tell what must be told apart."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from qtune.export.exporter import Trained, export
from qtune.export.folder.manifest import adapter_hash, base_hash, versions


def test_manifest_of_an_export(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train("qwen2")
    folder = export("qtune", trained, tmp_path / "out")
    found = json.loads((folder / "qtune.json").read_text())
    assert (found["export"], found["form"], found["consumer"]) == ("qtune", "pair", "qtune")
    assert found["base"]["model"] == str(trained.base_folder)
    assert found["trained_on"] == {"format": "nf4", "group_size": 64}
    template = trained.tokenizer.chat_template
    assert found["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert found["stop_ids"] == [0, 2]
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["adapter_sha256"] == adapter_hash(trained.model)


def test_model_without_template_has_no_hash_of_it(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("qwen2")
    bare = replace(trained, tokenizer=type(trained.tokenizer).from_pretrained(trained.base_folder))
    bare.tokenizer.chat_template = None
    folder = export("adapter", bare, tmp_path / "out")
    found = json.loads((folder / "qtune.json").read_text())
    assert found["template_sha256"] is None and found["stop_ids"] == [0]


def test_base_is_hashed_whole_or_by_its_headers(bases: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bases["qwen2"], tmp_path / "copy"))
    whole, headers = base_hash(copy), base_hash(copy, whole_bytes=10)
    assert (whole["of"], headers["of"]) == ("sizes and files", "sizes and headers")
    content = (copy / "model.safetensors").read_bytes()
    size = len(content).to_bytes(8, "little")
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert whole["sha256"] == hashlib.sha256(size + content).hexdigest()
    assert headers["sha256"] == hashlib.sha256(size + header).hexdigest()
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert base_hash(copy)["sha256"] != whole["sha256"]
    assert base_hash(copy, whole_bytes=10) == headers


def test_adapter_hash_follows_every_value(train: Callable[..., Trained]) -> None:
    one, two = train(), train()
    assert adapter_hash(one.model) == adapter_hash(two.model)
    with torch.no_grad():
        next(p for p in two.model.parameters() if p.requires_grad)[-1, -1] += 1e-6
    assert adapter_hash(one.model) != adapter_hash(two.model)


def test_versions_name_what_is_not_installed() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert all(value is None or value[0].isdigit() for value in found.values())
