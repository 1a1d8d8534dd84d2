"""llama.cpp behind the face of a transformers model."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from qtune.export.consumers.engine import EngineModel, Rows, made_ready
from qtune.export.consumers.llama_context import LlamaContext
from qtune.export.consumers.llama_file import LlamaFile

# llama.cpp's own limit
MAX_ROWS = 256
# the cache grows in steps of so many tokens per row
CACHE_STEP = 256


class LlamaCppModel(EngineModel):
    """A model in a GGUF file, whose logits come from llama.cpp."""

    def __init__(self, config: Any, file: LlamaFile) -> None:
        super().__init__(config)
        self.file = file
        self._context: LlamaContext | None = None

    def row_logits(self, rows: Rows, wanted: Rows) -> Tensor:
        """Logits, float32 [N, V], of rows of ids at their `wanted` places, row after row.

        Raises UserError where llama.cpp fails.
        """
        return self._fitting(rows).logits(rows, wanted)

    def _fitting(self, rows: Rows) -> LlamaContext:
        """A context with room for the rows: the present one, or else a larger one."""
        num, length = len(rows), max(map(len, rows))
        if num > MAX_ROWS:
            raise ValueError(f"llama.cpp takes at most {MAX_ROWS} rows at a time, not {num}")
        now = self._context
        if now is None or num > now.rows or length > now.length:
            length = max(-(-length // CACHE_STEP) * CACHE_STEP, now.length if now else 0)
            # the old one goes first: two need not fit into memory
            now = self._context = None
            now = self._context = LlamaContext(self.file, num, length)
        return now


def load(path: Path, folder: Path, adapter: Path | None = None) -> LlamaCppModel:
    """The GGUF file at `path` in llama.cpp, with the LoRA GGUF `adapter` on it if one is named.

    `folder` has the config.json and generation_config.json that go with it. Raises UserError where
    xllamacpp is missing or llama.cpp refuses a file.
    """
    model = LlamaCppModel(AutoConfig.from_pretrained(folder), LlamaFile(path, adapter))
    made_ready(model, folder)
    return model
