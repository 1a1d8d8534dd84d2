"""What is uploaded, and what is refused; only the hub's own functions are stood in for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from qtune.errors import UserError
from qtune.serving.push import push, rename_base
from qtune.serving.verify_folder import verify

Copied = Callable[..., Path]
BASE = "some-org/tiny-llama"


@pytest.fixture
def ready(copied: Copied) -> Callable[[str], Path]:
    """A maker of exports that nothing speaks against."""

    def make(name: str) -> Path:
        folder = copied(name)
        rename_base(folder, BASE)
        return folder

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reached the hub; of an upload with the card as it was then."""
    calls: list[dict[str, Any]] = []

    def create_repo(self: object, repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id} | options)
        return f"https://hub/{repo_id}"

    def upload_folder(self: object, **options: Any) -> None:
        card = (options["folder_path"] / "README.md").read_text()
        calls.append(options | {"card": card})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_folder_is_uploaded_under_its_name(
    ready: Callable[[str], Path], hub: list[dict[str, Any]]
) -> None:
    folder = ready("bf16")
    before = (folder / "README.md").read_text()
    push(folder, "me/tuned", private=True)
    made, sent = hub
    assert (made["repo_id"], made["private"], made["exist_ok"]) == ("me/tuned", True, True)
    assert (sent["repo_id"], sent["folder_path"]) == ("me/tuned", folder)
    assert (
        'from_pretrained("me/tuned"' in sent["card"] and 'from_pretrained(".")' not in sent["card"]
    )
    assert "vllm serve me/tuned" in sent["card"]
    assert (folder / "README.md").read_text() == before


def test_card_keeps_what_a_name_on_the_hub_cannot_say(
    ready: Callable[[str], Path], hub: list[dict[str, Any]]
) -> None:
    folder, command = ready("qtune"), "vllm serve . --lora-modules tuned=./adapter\n"
    with (folder / "README.md").open("a") as card:
        card.write(command)
    push(folder, "me/tuned")
    assert 'PeftModel.from_pretrained(model, "me/tuned", subfolder="adapter")' in hub[1]["card"]
    assert hub[1]["card"].endswith(command)


def test_dry_run_lists_and_sends_nothing(
    ready: Callable[[str], Path],
    hub: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(ready("bf16"), "me/tuned", dry_run=True)
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "dry run: nothing was sent" in shown
    assert "qtune.json holds 2 held-out requests of your data" in shown
    assert hub == []


def test_base_of_this_machine_is_refused_and_can_be_named(
    copied: Copied, base: Path, hub: list[dict[str, Any]]
) -> None:
    folder = copied("adapter")
    with pytest.raises(
        UserError, match=r"is a folder of this machine(?s:.*)--base ORG/NAME"
    ) as found:
        push(folder, "me/tuned")
    assert "adapter_config.json: base_model_name_or_path" in str(found.value)
    assert "qtune.json: base.model" in str(found.value)
    push(folder, "me/tuned", base=BASE)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    assert f"base_model: {BASE}\n" in hub[1]["card"]
    assert verify(folder, base=base).differences == []


def test_changed_folder_is_refused(ready: Callable[[str], Path], hub: list[dict[str, Any]]) -> None:
    folder = ready("bf16")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"is not uploaded:\n  chat_template.jinja: has "):
        push(folder, "me/tuned", base="other/base")
    assert hub == []


@pytest.mark.parametrize("key", ["hf_" + "a1B2" * 9, "sk-" + "x" * 40, "AKIA" + "A1" * 8])
def test_keys_are_refused(
    key: str, ready: Callable[[str], Path], hub: list[dict[str, Any]]
) -> None:
    folder = ready("bf16")
    with (folder / "README.md").open("a") as card:
        card.write(f"use my key {key}\n")
    with pytest.raises(UserError, match=r"README.md: holds what looks like a key: ") as found:
        push(folder, "me/tuned")
    assert key not in str(found.value) and hub == []


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("license: other\n", "license: other needs a license_name"),
        ("license: [\n", "its front matter cannot be read"),
        ("base_model: /here/there\n", "is no name for the hub"),
    ],
)
def test_card_that_the_hub_would_refuse(
    front: str, problem: str, ready: Callable[[str], Path], hub: list[dict[str, Any]]
) -> None:
    folder = ready("bf16")
    (folder / "README.md").write_text(f"---\n{front}---\n# Tuned\n")
    with pytest.raises(UserError, match=problem):
        push(folder, "me/tuned", dry_run=True)


@pytest.mark.parametrize("name", ["tuned", "me/a b", "a/b/c"])
def test_name_that_the_hub_would_refuse(name: str, ready: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"is no name for the hub|must be ORG/NAME"):
        push(ready("bf16"), name, dry_run=True)


def test_folder_that_is_no_export_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="is no export of qtune"):
        push(base, "me/tuned")


def test_refusal_of_the_hub_says_how_to_log_in(
    ready: Callable[[str], Path], hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_repo(self: object, repo_id: str, **options: Any) -> str:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    with pytest.raises(UserError, match=r"Token is required; log in with `hf auth login`"):
        push(ready("bf16"), "me/tuned")
