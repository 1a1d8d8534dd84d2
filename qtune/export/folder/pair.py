"""The adapter of a pair, beside the base that it was trained on."""

from pathlib import Path

from qtune.export.adapter import base_name, has_tensors, write_adapter
from qtune.export.folder.trained import Trained


def write_beside(trained: Trained, folder: Path) -> None:
    """Write the adapter of `trained` into `folder`/adapter, if it has one."""
    if has_tensors(trained.model):
        inner = folder / "adapter"
        inner.mkdir()
        write_adapter(trained.model, inner, base_name(trained), trained.recipe.revision)
