"""Whether the disk has room for an export, asked before any of it is written."""

import shutil
from pathlib import Path

from qtune.errors import UserError


def need_space(folder: Path, size_bytes: int) -> None:
    """Raises UserError unless the disk of `folder` has room for `size_bytes`."""
    missing = size_bytes - shutil.disk_usage(folder).free
    if missing > 0:
        raise UserError(
            f"the disk of {folder.parent} is too small: this export takes {size_bytes:,} bytes and "
            f"{missing:,} are missing; make room, or export fewer forms"
        )
