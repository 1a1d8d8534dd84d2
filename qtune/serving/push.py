"""`qtune push`: an exported folder to the Hugging Face hub, if nothing speaks against it.

Everything is looked at before anything is sent, so that a dry run, which needs neither network nor
login, finds what a real one would: a folder that is no longer what was measured, keys, folders of
this machine, a card that the hub would refuse. Golden prompts are requests of the user's data; the
list says how many go along.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal

from qtune.errors import UserError
from qtune.export.folder import card, fingerprint, manifest
from qtune.export.folder.companions import write_json
from qtune.export.folder.usage import HERE, adapter_config
from qtune.model.folder import read_json
from qtune.progress import say
from qtune.serving import contents, secrets
from qtune.serving.difference import Difference

# how a card names the folder where a name on the hub does as well
_CALLS = (
    'from_pretrained("{}"',
    'from_pretrained(model, "{}"',
    "vllm serve {}\n",
    "modules tuned={}\n",
)
_IGNORED = [".*", "**/.*", "**/__pycache__/**"]


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    base: str | None = None,
) -> None:
    """Upload an exported folder to the model repository `repo` on the hub, made if need be.

    `base` is the base's name there, written into the folder in the place of a local one, also in a
    dry run. Raises UserError with all that speaks against it, and where the hub refuses.
    """
    _check_name(repo, "the repository")
    against = contents.differences(folder, manifest.read(folder))
    if base is not None and not against:
        rename_base(folder, base)
    _refuse(folder, against + secrets.found(folder) + _card(folder))
    written = manifest.read(folder)
    _list(folder, repo, written)
    if dry_run:
        say(f"dry run: nothing was sent; it would go to {repo}{' (private)' if private else ''}")
        return
    with _named_in_card(folder, repo):
        _upload(folder, repo, private, written)


def rename_base(folder: Path, base: str) -> None:
    """Write `base`, an id of the hub, as the base's name everywhere in an exported folder."""
    _check_name(base, "--base")
    written = manifest.read(folder)
    configs = [name for name in written["configs"] if name.endswith("adapter_config.json")]
    for name in configs:
        write_json(folder / name, read_json(folder / name) | {"base_model_name_or_path": base})
    now = fingerprint.files(folder)
    written["base"] |= {"model": base}
    written["files"] |= {name: now[name] for name in configs}
    written["configs"] |= {name: fingerprint.config(folder / name) for name in configs}
    write_json(folder / manifest.NAME, written)
    card.write(folder)


def _refuse(folder: Path, against: list[Difference]) -> None:
    """Raises UserError with all that speaks against an upload, unless that is nothing."""
    if against:
        found = "\n".join(f"  {difference}" for difference in against)
        hint = ""
        if any("folder of this machine" in difference.what for difference in against):
            hint = "\nname the base as it is called on the hub: --base ORG/NAME"
        raise UserError(f"{folder} is not uploaded:\n{found}{hint}")


def _check_name(name: str, what: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{what} {name!r} is no name for the hub: {error}") from error
    if "/" not in name:
        raise UserError(f"{what} {name!r} must be ORG/NAME, with your name or organisation first")


def _card(folder: Path) -> list[Difference]:
    """What is wrong with the card's front matter, as far as that shows without the hub."""
    from huggingface_hub import ModelCard

    path = folder / card.NAME
    if not path.is_file():
        return [Difference(card.NAME, "is missing; write the export again")]
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        return [Difference(card.NAME, f"its front matter cannot be read: {error}")]
    found = []
    if data.get("license") == "other" and not data.get("license_name"):
        found.append(Difference(card.NAME, "license: other needs a license_name"))
    if data.get("base_model"):
        _check_name(data["base_model"], f"base_model in {path}:")
    return found


def _list(folder: Path, repo: str, written: dict[str, Any]) -> None:
    """Print what is uploaded, and what of it one may want to think about."""
    files = sorted(path for path in folder.rglob("*") if _is_sent(path, folder))
    for path in files:
        say(f"{decimal(path.stat().st_size):>10}  {path.relative_to(folder).as_posix()}")
    total = sum(path.stat().st_size for path in files)
    say(f"{decimal(total):>10}  in {len(files)} files for {repo}")
    front = card.front_matter(folder / card.NAME)
    if "license" not in front:
        say(f"note: {card.NAME} names no license; the base's card named none")
    if "base_model" not in front:
        say("note: the card names no base_model; --base ORG/NAME does, where it is on the hub")
    if written["golden"]:
        say(f"note: qtune.json holds {len(written['golden'])} held-out requests of your data")
    config = adapter_config(folder)
    if config and not config.get("base_model_name_or_path"):
        say("note: the adapter's configuration names no base")


def _is_sent(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts)


@contextmanager
def _named_in_card(folder: Path, repo: str) -> Iterator[None]:
    """The repository's name where the card's code and commands mean the folder, for a while."""
    path = folder / card.NAME
    before = text = path.read_text(encoding="utf-8")
    for form in _CALLS:
        text = text.replace(form.format(HERE), form.format(repo))
    path.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def _upload(folder: Path, repo: str, private: bool, written: dict[str, Any]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message=f"{written['export']} export by qtune",
            ignore_patterns=_IGNORED,
        )
    except (HTTPError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the hub did not take {folder}: {first}; log in with `hf auth login`, and check that "
            f"you may write to {repo}"
        ) from error
    say(f"uploaded: {url}")
