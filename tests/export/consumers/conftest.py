"""A tiny base model as a GGUF file."""

from pathlib import Path

import pytest

from qtune.export.gguf_file.base import write_base


@pytest.fixture(scope="session")
def gguf_path(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in float16, beside the folder's own configuration."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    write_base(bases["llama"], path)
    return path
