"""Every exporter: what it writes is whole or not there, and its consumer computes the same."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qtune.data.calibration import Text
from qtune.errors import UserError
from qtune.export.exporter import (
    Trained,
    check,
    check_mixture,
    export,
    exporter_names,
    form_of,
    load_exporter,
    need_space,
    write_run_adapter,
)
from qtune.export.folder import template
from qtune.export.verify import check_logits, reload
from qtune.model.merge import merged_tensors
from qtune.recipe import Merge, Quant

CPU = torch.device("cpu")
COMPANIONS = {
    "LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "qtune.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
MODEL = {"config.json", "model.safetensors"}
PAIR = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
WRITTEN = {
    "adapter": {"adapter_config.json", "adapter_model.safetensors"},
    "bf16": MODEL,
    "bitsandbytes": MODEL | PAIR,
    "qtune": MODEL | PAIR,
}


NAMES = list(WRITTEN)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def trained(request: pytest.FixtureRequest, train: Callable[..., Trained]) -> Trained:
    return train(request.param)


def expected_model(name: str, trained: Trained) -> PreTrainedModel | PeftModel:
    """The trained model, but for exports on 16-bit weights the merge made in memory."""
    if name in ("bitsandbytes", "qtune"):
        return trained.model
    onto = trained.onto if name == "bf16" else "original"
    dense = AutoModelForCausalLM.from_pretrained(trained.base_folder, dtype=torch.bfloat16)
    tensors = dict(merged_tensors(trained.base_folder, trained.model, onto))
    dense.load_state_dict(tensors, strict=not trained.base.config.tie_word_embeddings)
    return dense


@pytest.mark.parametrize("name", NAMES)
def test_consumer_computes_what_was_exported(
    name: str, trained: Trained, tmp_path: Path, rows: list[list[int]]
) -> None:
    assert load_exporter(name).check(trained.recipe) == []
    folder = export(name, trained, tmp_path / "export" / name)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == COMPANIONS | WRITTEN[name]
    assert [p.name for p in folder.parent.iterdir()] == [name]
    model = reload(name, folder, trained.base_folder, CPU)
    assert not model.training
    found = check_logits(model, expected_model(name, trained), rows, max_change=0.03)
    assert found.top1 > 0.9
    # the base alone is something else
    plain = AutoModelForCausalLM.from_pretrained(trained.base_folder, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="differs"):
        check_logits(model, plain, rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    assert tokenizer("a b").input_ids == trained.tokenizer("a b").input_ids


@pytest.mark.parametrize("name", ["bitsandbytes", "qtune"])
def test_merged_form_is_close_to_the_original_merge(
    name: str, trained: Trained, tmp_path: Path, rows: list[list[int]]
) -> None:
    merged = replace(trained, form="merged", text=lambda: Text(rows, "here"))
    folder = export(name, merged, tmp_path / name)
    assert not (folder / "adapter").exists()
    model = reload(name, folder, trained.base_folder, CPU)
    found = check_logits(model, expected_model("bf16", trained), rows, max_change=0.5)
    assert found.change > 0.05, "four bits lose more than that"


@pytest.mark.parametrize("name", NAMES)
def test_size_is_about_what_is_written(name: str, trained: Trained, tmp_path: Path) -> None:
    folder = export(name, trained, tmp_path / name)
    written = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    size = load_exporter(name).size_bytes(trained)
    assert 0.7 * written < size < 1.5 * written + 10_000


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_write_leaves_nothing(
    name: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qtune.export.folder.companions.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(name, trained, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_earlier_export_is_replaced_at_the_end_only(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export("adapter", trained, tmp_path / "adapter")
    (folder / "mark").write_text("old")
    broken = replace(trained, base_folder=tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        export("adapter", broken, folder)
    assert (folder / "mark").read_text() == "old"
    export("adapter", trained, folder)
    assert not (folder / "mark").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_remains_of_a_killed_process_are_no_trouble(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial/part").write_text("half")
    folder = export("adapter", trained, tmp_path / "adapter")
    assert not (folder / "part").exists() and [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_folder_of_somebody_else_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="was not written by qtune"):
        export("adapter", trained, tmp_path / "photos")
    assert (tmp_path / "photos").is_dir()


def test_folder_that_cannot_be_made_is_an_error(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export("adapter", trained, tmp_path / "file" / "adapter")


def test_full_disk_is_told_in_bytes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    need_space(tmp_path, free // 2)
    with pytest.raises(UserError, match=r"too small: .* [\d,]{17,} are missing"):
        need_space(tmp_path, free + 10**13)


def test_every_reason_is_given_at_once(trained: Trained) -> None:
    recipe = replace(trained.recipe, quant=Quant(format=None))
    with pytest.raises(UserError) as error:
        check(replace(recipe, merge=Merge(quantized="pair")), ("adapter", "bitsandbytes", "qtune"))
    first, second = str(error.value).splitlines()
    assert first.startswith("export bitsandbytes: ") and second.startswith("export qtune: ")
    check(recipe, ("adapter", "bitsandbytes", "qtune"))
    assert form_of("bitsandbytes", recipe) == "merged"


@pytest.mark.parametrize("name", exporter_names())
def test_each_name_has_its_exporter(name: str) -> None:
    assert load_exporter(name).consumer


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="'gguf'; there are: adapter, adapter-gguf, bf16"):
        load_exporter("gguf")


def test_adapter_of_a_run_is_written_whole(trained: Trained, tmp_path: Path) -> None:
    write_run_adapter(trained.model, tmp_path / "run/adapter", "some/model")
    names = {p.name for p in (tmp_path / "run/adapter").iterdir()}
    assert names == WRITTEN["adapter"]
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    write_run_adapter(trained.model, tmp_path / "run/adapter", "other/model")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["adapter"]


def test_adapter_of_a_run_keeps_its_template(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run/adapter"
    write_run_adapter(trained.model, folder, "some/model", tokenizer=trained.tokenizer)
    names = {p.name for p in folder.iterdir()}
    assert names == WRITTEN["adapter"] | {"qtune.json", "chat_template.jinja"}
    template.check(folder, trained.tokenizer)


MIXTURE = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj.expert_0")


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("bitsandbytes",), {}, "export bitsandbytes: its layout has no quantized experts"),
        (("qtune",), {"merge": {"quantized": "merged"}}, "export qtune: a mixture's experts"),
        (("adapter",), {"lora": {"experts": True}}, "export adapter: PEFT alone has no such"),
    ],
)
def test_what_cannot_hold_a_mixture_of_experts(tiny_recipe, names, changes, message) -> None:
    recipe = tiny_recipe(**changes)
    check_mixture(recipe, names, MIXTURE[:1])
    with pytest.raises(UserError, match=message):
        check_mixture(recipe, names, MIXTURE)
    check_mixture(recipe, ("bf16",), MIXTURE)
