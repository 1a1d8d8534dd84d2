"""qtune.json: its hashes tell what must be told apart."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qtune import recipe_yaml
from qtune.errors import UserError
from qtune.export.exporter import Trained, export
from qtune.export.folder.manifest import (
    adapter_hash,
    add_results,
    base_hash,
    quantizer,
    read,
    recipe_text,
    versions,
    write_template,
)
from qtune.recipe import Data, Quant, Recipe, Train


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


def test_manifest_is_written_last_and_knows_every_file(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    folder = export("qtune", train(), tmp_path / "out")
    found = read(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(found["files"]) == names - {"qtune.json", "README.md"}
    assert "adapter/adapter_model.safetensors" in names
    assert found["configs"]["config.json"] == json.loads((folder / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in found["modules"]
    assert found["schema"] == 1 and found["exact"] is True
    expected = {"format": "nf4", "group_size": 64, "method": "nearest", "rotate": False}
    assert found["quantizer"] == expected | {"layers": {}, "layout": 1}


def test_quantizer_of_merged_weights_is_their_own() -> None:
    assert quantizer(None) is None and quantizer(Quant(format=None)) is None
    found = quantizer(Quant(format="int4", method="gptq", rotate=True, layers={"head": "int8"}))
    assert found is not None
    assert (found["format"], found["method"], found["rotate"]) == ("int4", "gptq", True)
    assert found["layers"] == {"head": "int8"}


def test_recipe_is_whole_but_for_folders(tmp_path: Path) -> None:
    data = Data(train="/home/me/my-data/train.jsonl", test="tests/x.jsonl")
    model = "pypi:a==1/b.gguf"
    recipe = Recipe(model=model, data=data, train=Train(steps=7), run=tmp_path / "first")
    text = recipe_text(recipe)
    (tmp_path / "again.yaml").write_text(text)
    again = recipe_yaml.load(tmp_path / "again.yaml")
    expected = replace(data, train="train.jsonl")
    assert again == replace(recipe, data=expected, run=Path("first"))
    assert "/home" not in text and str(tmp_path) not in text
    hub = recipe_text(replace(recipe, model="org/model", run=Path("~/runs/x")))
    assert "model: org/model\n" in hub and "run: x\n" in hub


def test_results_have_no_infinity(train: Callable[..., Trained], tmp_path: Path) -> None:
    folder = export("bf16", train(), tmp_path / "out")
    row = {"loss": 1.0, "perplexity": math.inf, "tokens": 1, "answers": 0, "size_bytes": 1}
    inner = {"more": ({"x": math.nan},), "text": {"file": "/home/me/a.txt"}}
    add_results(folder, row | inner, row | {"perplexity": 2.0})
    content = json.loads((folder / "qtune.json").read_text(), parse_constant=pytest.fail)
    assert content["results"]["this"]["perplexity"] is None
    assert content["results"]["this"]["more"] == [{"x": None}]
    assert content["results"]["this"]["text"] == {"file": "a.txt"}
    assert content["results"]["trained"]["perplexity"] == 2 and content["results"]["base"] is None
    assert "trained model" in (folder / "README.md").read_text()


def test_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no export of qtune: it has no qtune.json"):
        read(tmp_path)
    (tmp_path / "qtune.json").write_text(json.dumps({"export": "bf16", "schema": 99}))
    with pytest.raises(UserError, match=r"schema 99, not 1"):
        read(tmp_path)


def test_adapter_of_a_run_is_no_export(train: Callable[..., Trained], tmp_path: Path) -> None:
    write_template(tmp_path, train().tokenizer)
    with pytest.raises(UserError, match=r"is no export of qtune: qtune.json in it says"):
        read(tmp_path)


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
