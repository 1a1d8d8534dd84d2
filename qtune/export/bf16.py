"""`bf16`: one merged 16-bit model that anything built on transformers loads.

The caller decides what the adapter is merged onto (`Trained.onto`). A base stored in float32 is
rounded to the dtype of training; one stored in 16 bits keeps its dtype, whichever that is.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qtune.export.folder.companions import write_config
from qtune.export.folder.dense import (
    dense_bytes,
    dense_config,
    dense_dtype,
    dense_tensors,
    form_of,
)
from qtune.export.folder.load import load_model
from qtune.export.folder.trained import Form, Trained
from qtune.model.shards import write_shards
from qtune.recipe import Recipe


class Bf16Exporter:
    """Writes merged weights."""

    consumer = "transformers"
    forms: tuple[Form, ...] = ("merged",)

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """Nothing: every adapter that qtune trains can be merged."""
        return []

    def quant(self, recipe: Recipe) -> None:
        """None: its weights are in 16 bits."""

    def size_bytes(self, trained: Trained) -> int:
        """The bytes of the 16-bit weights."""
        return dense_bytes(trained)

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the merged weights and config.json."""
        write_shards(dense_tensors(trained), folder)
        write_config(trained.base_folder, folder, dense_config(trained, dense_dtype(trained)))
        return form_of(trained)

    def load(self, folder: Path, base_folder: Path, device: torch.device) -> PreTrainedModel:
        """The merged model, as transformers loads it."""
        return load_model(folder, device)


EXPORTERS = {"bf16": Bf16Exporter()}
