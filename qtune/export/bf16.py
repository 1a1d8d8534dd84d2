"""`bf16`: one merged 16-bit model that anything built on transformers loads.

The caller decides what the adapter is merged onto (`Trained.onto`). A base stored in float32 is
rounded to the dtype of training; one stored in 16 bits keeps its dtype, whichever that is.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qtune.export.folder.companions import write_config
from qtune.export.folder.load import load_model
from qtune.export.folder.trained import Form, Trained
from qtune.model.checkpoint import stored_dtype, weight_files
from qtune.model.merge import merged_tensors, untied
from qtune.model.shards import write_shards
from qtune.recipe import Recipe


class Bf16Exporter:
    """Writes merged weights."""

    consumer = "transformers"

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """Nothing: every adapter that qtune trains can be merged."""
        return []

    def quant(self, recipe: Recipe) -> None:
        """None: its weights are in 16 bits."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of the 16-bit weights."""
        parameters = trained.base.parameters()
        stored = sum(path.stat().st_size for path in weight_files(trained.base_folder))
        return max(stored, sum(p.numel() * 2 for p in parameters if p.dtype != torch.uint8))

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the merged weights and config.json."""
        merged = merged_tensors(
            trained.base_folder,
            trained.model,
            trained.onto,
            start=trained.start,
            round_to=trained.round_to,
        )
        write_shards(merged, folder)
        write_config(trained.base_folder, folder, self._config(trained))
        return {"form": "merged", "onto": trained.onto}

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PreTrainedModel:
        """The merged model, as transformers loads it."""
        return load_model(folder, device)

    def _config(self, trained: Trained) -> dict[str, Any]:
        dtype = trained.round_to or stored_dtype(trained.base_folder)
        changes: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        return changes | ({"tie_word_embeddings": False} if untied(trained.model) else {})


EXPORTERS = {"bf16": Bf16Exporter()}
