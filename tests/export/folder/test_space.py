"""The disk is asked before an export is written."""

import shutil
from pathlib import Path

import pytest

from qtune.errors import UserError
from qtune.export.folder.space import need_space


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    need_space(tmp_path, free // 2)
    with pytest.raises(UserError, match=r"too small: this export takes .* are missing"):
        need_space(tmp_path, free + 10**13)
