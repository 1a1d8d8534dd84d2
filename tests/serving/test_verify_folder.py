"""A copy of an export is verified, spoilt in one place, and told what the place is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtune.errors import UserError
from qtune.serving.verify_folder import check, verify

Copied = Callable[..., Path]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=1))


@pytest.mark.parametrize("name", ["bf16", "qtune", "adapter"])
def test_copy_is_the_same(name: str, copied: Copied, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(name)
    report = verify(folder)
    assert report.differences == []
    assert len(report.replays) == 2
    assert all(replay.change < 1e-3 and replay.first is None for replay in report.replays)
    check(folder)
    assert "template are as they were written, and so are 2 answers" in capsys.readouterr().out


def test_changed_tensor_is_named_and_seen_in_the_answers(copied: Copied) -> None:
    folder = copied("bf16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(-1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = verify(folder).differences
    assert str(found[0]) == "model.layers.1.mlp.down_proj: tensors have changed"
    assert any("log-probabilities moved by" in d.what for d in found if "golden" in d.where)
    with pytest.raises(UserError, match=r"is not what was exported(?s:.*)layers.1.mlp.down_proj"):
        check(folder)


def test_answer_that_turned_is_named_by_its_tokens(copied: Copied) -> None:
    folder = copied("bf16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].mul_(-1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "qtune.json").read_text())["golden"][0]
    told = [d.what for d in verify(folder).differences if d.where == "golden prompt 1"]
    assert told[0].startswith("token 1 of the answer is ")
    assert f"and was {written['greedy_ids'][0]} (" in told[0]


def test_weights_in_other_files_are_no_difference(copied: Copied) -> None:
    folder = copied("bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    shutil.copyfile(folder / "config.json", folder / "config.json.bak")
    (folder / "config.json.bak").unlink()
    found = verify(folder).differences
    assert not [
        d for d in found if d.where != "config.json" and d.where != "generation_config.json"
    ]


def test_changed_configuration_is_named_by_its_keys(copied: Copied) -> None:
    folder = copied("bf16")
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": 7.0}
    change_json(folder / "config.json", rope_parameters=rope, extra=1)
    told = {str(d) for d in verify(folder).differences}
    theta = config["rope_parameters"]["rope_theta"]
    assert f"config.json: rope_parameters.rope_theta is 7.0, and was {theta}" in told
    assert "config.json: extra is 1, and was not there" in told


def test_configuration_in_another_form_is_no_difference(copied: Copied) -> None:
    folder = copied("bf16")
    change_json(folder / "config.json")
    change_json(folder / "generation_config.json")
    assert verify(folder).differences == []


def test_model_that_no_longer_fits_its_configuration_is_told_by_the_key(copied: Copied) -> None:
    folder = copied("bf16")
    change_json(folder / "config.json", intermediate_size=192)
    report = verify(folder)
    assert [str(d) for d in report.differences] == [
        "config.json: intermediate_size is 192, and was 128"
    ]
    assert report.replays == [] and report.notes[-1].startswith("not loaded: ")


def test_changed_template_is_told_with_the_place(copied: Copied) -> None:
    folder = copied("bf16")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    told = [str(d) for d in verify(folder).differences]
    assert any(line.startswith("chat template: its SHA-256 is ") for line in told)
    assert any(
        line.startswith("golden prompt 1: is rendered otherwise from character ") for line in told
    )


def test_changed_token_is_named_by_its_id(copied: Copied) -> None:
    folder = copied("bf16")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    # stands for a byte that is in no text
    vocabulary["changed"] = token = vocabulary.pop("\u00fe")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    told = [str(d) for d in verify(folder).differences]
    assert f"tokenizer: token {token} is another one" in told


def test_changed_added_token_is_named(copied: Copied) -> None:
    folder = copied("bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|done|>"))
    told = [str(d) for d in verify(folder).differences]
    assert "added tokens: 2 is '<|done|>', and was '<|im_end|>'" in told
    assert any(line.startswith("golden prompt 1: token ") for line in told)


@pytest.mark.parametrize("spoil", ["missing", "cut"])
def test_folder_without_whole_weights_is_not_loaded(spoil: str, copied: Copied) -> None:
    folder = copied("bf16")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if spoil == "cut":
        path.write_bytes(content[: len(content) // 2])
    report = verify(folder)
    expected = "is missing" if spoil == "missing" else "is cut off in"
    assert any(expected in d.what for d in report.differences)
    assert report.notes == ["not loaded: files are missing or damaged"]


def test_other_base_of_an_adapter_is_told(copied: Copied, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"].mul_(-1)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = verify(copied("adapter"), base=other).differences
    assert found[0].where == "base" and "and was " in found[0].what
    assert found[1].where == "golden prompt 1"


def test_export_that_was_never_measured_is_not_loaded(
    copied: Copied, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("bf16")
    change_json(folder / "qtune.json", golden=[])
    check(folder)
    shown = capsys.readouterr().out
    assert "note: not loaded: it has no golden prompts" in shown
    assert shown.endswith("template are as they were written\n")


def test_library_of_choice_loads_it(copied: Copied) -> None:
    report = verify(copied("bf16"), "transformers")
    assert report.consumer == "transformers" and report.differences == []
    with pytest.raises(UserError, match=r"--with gnu: nothing .* there are .*transformers"):
        verify(copied("qtune"), "gnu")


def test_folder_that_is_no_export_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"is no export of qtune: it has no qtune.json"):
        verify(base)


def test_conversion_is_checked_with_the_library_that_it_is_for(
    copied: Copied, exported: Callable[..., Path]
) -> None:
    """A GGUF file, put beside what it was converted from, answers as that did."""
    pytest.importorskip("xllamacpp")
    folder = copied("bf16")
    with pytest.raises(UserError, match=r"model\.gguf"):
        verify(folder, "llama.cpp")
    shutil.copy(exported("gguf-f16", form="merged") / "model.gguf", folder)
    report = verify(folder, "llama.cpp")
    assert [str(difference) for difference in report.differences] == ["model.gguf: was not there"]
    assert len(report.replays) == 2 and report.consumer == "llama.cpp"
