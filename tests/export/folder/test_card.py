"""The model card: what the hub reads of it, and that it makes nothing up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qtune.export.exporter import Trained, export
from qtune.export.folder import card, manifest
from qtune.export.folder.card import front_matter, hub_name, metadata, write
from qtune.model.sources import MIRRORS

ROW: dict[str, Any] = {
    "loss": 1.25,
    "perplexity": 3.4903,
    "tokens": 100,
    "kl": 0.0012,
    "top1": 0.98,
    "exact_match": 0.5,
    "answers": 10,
    "size_bytes": 1500,
}


@pytest.fixture
def exported(train: Callable[..., Trained], tmp_path: Path) -> Callable[[str], Path]:
    """A maker of exports by name."""
    return lambda name: export(name, train(), tmp_path / name)


def data(folder: Path) -> dict[str, Any]:
    """The card's front matter as the hub's library reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_licence_is_the_one_that_the_base_names(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = exported("bf16")
    front = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage:\n- en\n"
    (folder / "README.base.md").write_text(f"---\n{front}library_name: mlx\n---\n# Base\n")
    write(folder)
    found = data(folder)
    assert (found["license"], found["license_name"]) == ("other", "llama3")
    assert (found["language"], found["library_name"]) == (["en"], "transformers")


def test_licence_file_is_pointed_to_and_no_licence_is_none(
    exported: Callable[[str], Path],
) -> None:
    folder = exported("bf16")
    assert (folder / "LICENSE").is_file()
    found = data(folder)
    assert (found["license"], found["license_link"]) == ("other", "LICENSE")
    (folder / "LICENSE").unlink()
    write(folder)
    assert "license" not in data(folder)


@pytest.mark.parametrize(
    ("name", "library", "relation", "tags"),
    [
        ("adapter", "peft", "adapter", ["qtune", "lora", "conversational"]),
        ("bf16", "transformers", "finetune", ["qtune", "conversational"]),
        ("qtune", "qtune", "quantized", ["qtune", "lora", "conversational"]),
    ],
)
def test_what_the_hub_sorts_by(
    name: str, library: str, relation: str, tags: list[str], exported: Callable[[str], Path]
) -> None:
    folder = exported(name)
    written = json.loads((folder / "qtune.json").read_text())
    written["base"]["model"] = "some-org/llama"
    found = metadata(folder, written)
    assert (found["base_model"], found["base_model_relation"]) == ("some-org/llama", relation)
    assert (found["library_name"], found["pipeline_tag"]) == (library, "text-generation")
    assert found["tags"] == tags


def test_base_on_this_machine_is_no_name_of_the_hub(exported: Callable[[str], Path]) -> None:
    assert "base_model" not in data(exported("bf16"))


def test_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("org/model") == "org/model"
    assert [hub_name(str(file)) for file in MIRRORS.values()] == list(MIRRORS)
    assert hub_name("pypi:a==1/x.gguf") is None and hub_name("/home/me/model") is None
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/model") is None


def test_card_has_the_results(exported: Callable[[str], Path]) -> None:
    folder = exported("bf16")
    assert "This export was not measured." in (folder / "README.md").read_text()
    manifest.add_results(folder, ROW, ROW)
    assert "| **this export** | 1.2500 |" in (folder / "README.md").read_text()


def test_card_says_what_it_is_and_how_it_was_made(exported: Callable[[str], Path]) -> None:
    pair, merged = ((exported(name) / "README.md").read_text() for name in ("qtune", "bf16"))
    assert "It is the very model that was trained" in pair
    assert "It is not bit for bit the model that was trained" in merged
    for text in (pair, merged):
        assert "Answers end with token 2 or 0." in text
        assert "```yaml\nmodel: llama\n" in text


def test_model_without_template_has_a_card_that_says_so(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("qwen2")
    tokenizer = type(trained.tokenizer).from_pretrained(trained.base_folder)
    tokenizer.chat_template = None
    folder = export("bf16", replace(trained, tokenizer=tokenizer), tmp_path / "out")
    assert "it has no chat template" in (folder / "README.md").read_text()
    assert "conversational" not in data(folder)["tags"]


def test_front_matter_of_a_card_that_nobody_can_read(tmp_path: Path) -> None:
    path = tmp_path / card.NAME
    assert front_matter(path) == {}
    for text in ("# no front matter", "---\n[\n---\n", "---\n- a list\n---\n"):
        path.write_text(text)
        assert front_matter(path) == {}
    path.write_bytes(b"---\r\nlicense: mit\r\n---\r\n")
    assert front_matter(path) == {"license": "mit"}
