"""The files of an exported folder against qtune.json: what is missing, changed or new, and what in
it.

A file that changed without what it says being another, as a configuration that was formatted anew
or weights in other shards, is no difference.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.export.folder import fingerprint
from qtune.serving.difference import Difference, values

WEIGHTS = (".safetensors", ".safetensors.index.json")
# a folder loads without these
_BESIDE = (".md", ".txt", ".py", ".jinja", "LICENSE", "LICENCE", "NOTICE")
# modules named in a list, before the rest is counted
_SHOWN = 5


def differences(folder: Path, manifest: dict[str, Any]) -> list[Difference]:
    """All that differs between the files of the folder and those that were written."""
    changed = {difference.where: difference for difference in _files(folder, manifest)}
    told: list[Difference] = []
    for name in manifest["configs"]:
        if name in changed and not changed[name].breaks:
            told += _config(folder, name, manifest["configs"][name])
            del changed[name]
    weights = [name for name in changed if name.endswith(WEIGHTS)]
    if weights:
        modules = list(_modules(folder, manifest["modules"]))
        for name in weights:
            # what is in files that are there was told, and no others are needed for it
            if not modules or (folder / name).is_file():
                del changed[name]
        told += modules
    return told + list(changed.values())


def _files(folder: Path, manifest: dict[str, Any]) -> Iterator[Difference]:
    """Files that are not as they were."""
    was, now = manifest["files"], fingerprint.files(folder)
    for name, file in was.items():
        if name not in now:
            yield Difference(name, "is missing", breaks=not name.endswith(_BESIDE))
        elif now[name] != file:
            size, old = now[name]["bytes"], file["bytes"]
            what = "has changed" if size == old else f"has {size:,} bytes, and had {old:,}"
            yield Difference(name, what, breaks=size == 0)
    yield from (Difference(name, "was not there") for name in now if name not in was)


def _config(folder: Path, name: str, was: dict[str, Any]) -> Iterator[Difference]:
    try:
        yield from values(name, was, fingerprint.config(folder / name))
    except UserError as error:
        yield Difference(name, str(error), breaks=True)


def _modules(folder: Path, was: dict[str, str]) -> Iterator[Difference]:
    """Modules whose tensors are other ones, the first of them by name."""
    try:
        now = fingerprint.modules(folder)
    except UserError as error:
        yield Difference("weights", str(error), breaks=True)
        return
    for what, names in (
        ("tensors have changed", [n for n in was if n in now and now[n] != was[n]]),
        ("tensors are missing", [n for n in was if n not in now]),
        ("tensors were not there", [n for n in now if n not in was]),
    ):
        for name in names[:_SHOWN]:
            yield Difference(name, what, breaks="missing" in what)
        if len(names) > _SHOWN:
            yield Difference("weights", f"{what} in {len(names) - _SHOWN} more modules")
