"""Where downloaded and converted models are kept, and how one is put there.

A model is built in a partial folder beside its place and renamed when complete, so a folder that
exists is whole. A lock file lets one of several processes build while the others wait.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from qtune.errors import UserError


def cache_folder() -> Path:
    """`QTUNE_CACHE`, or ~/.cache/qtune; it need not exist."""
    return Path(os.environ.get("QTUNE_CACHE") or "~/.cache/qtune").expanduser().absolute()


def model_folder(name: str, identity: str) -> Path:
    """Place of the model whose source and conversion `identity` describes, whether there or not."""
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return cache_folder() / "models" / f"{name}-{digest[:12]}"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(partial folder)` unless it exists; UserError: unwritable."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    _make_writable(folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        # Left by a process that was killed: whoever holds the lock owns it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def need_space(folder: Path, size_bytes: int) -> None:
    """UserError unless the disk of `folder` has room for `size_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise UserError(
            f"{folder} needs {size_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "make room, or point QTUNE_CACHE at a larger disk"
        )


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the model cache {folder} cannot be made ({error.strerror}); "
            "point QTUNE_CACHE elsewhere"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the model cache {folder} is read-only; point QTUNE_CACHE elsewhere")
