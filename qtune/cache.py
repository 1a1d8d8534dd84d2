"""Where downloaded models, converted ones and tokenised data are kept, and how one is put there.

A folder is built beside its place under a partial name and renamed when complete, so a folder that
exists is whole. A lock file lets one of several processes build while the others wait.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from qtune.errors import UserError

# seconds between looks at whether another process has built a folder
LOOK_EVERY = 0.1
# seconds in which a process must begin to build what others wait for; large files are hashed first
PATIENCE = 1800.0


def cache_folder() -> Path:
    """`QTUNE_CACHE`, or ~/.cache/qtune; it need not exist."""
    return Path(os.environ.get("QTUNE_CACHE") or "~/.cache/qtune").expanduser().absolute()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(partial folder)` unless it exists; UserError: unwritable."""
    if folder.is_dir():
        return folder
    partial = _partial(folder)
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


def wait_for(folder: Path) -> Path:
    """`folder`, once another process has built it.

    Building may take hours, and there is no limit to it, unlike in a collective operation; if it
    fails, whoever started the processes ends them all. UserError: nobody builds it.
    """
    seen = time.monotonic()
    while not folder.is_dir():
        if _partial(folder).exists():
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE:
            raise UserError(
                f"no process builds {folder}: is QTUNE_CACHE the same for all of them, and do "
                "none of their files change while they start?"
            )
        time.sleep(LOOK_EVERY)
    return folder


def need_space(folder: Path, size_bytes: int) -> None:
    """UserError unless the disk of `folder` has room for `size_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise UserError(
            f"{folder} needs {size_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "make room, or point QTUNE_CACHE at a larger disk"
        )


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}); point QTUNE_CACHE elsewhere"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the cache {folder} is read-only; point QTUNE_CACHE elsewhere")
