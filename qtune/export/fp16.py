"""`fp16`: the merged model in float16, for GPUs and programs that have no bfloat16.

Float16 has three more bits for the digits and three fewer for the size, and weights are rounded
once: of a small adapter it keeps what bfloat16 rounds away. Weights beyond 65504 have
no place in it and are refused; the smallest, below 6e-5, are off by 3e-8 at most. Activations may
be too large for it as well, which only running it shows: the measured row of the export does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtune.errors import UserError
from qtune.export.bf16 import Bf16Exporter
from qtune.export.folder.companions import write_config
from qtune.export.folder.dense import dense_config, dense_tensors, form_of
from qtune.export.folder.trained import Trained
from qtune.model.shards import write_shards

LARGEST = torch.finfo(torch.float16).max


class Fp16Exporter(Bf16Exporter):
    """Writes merged weights in float16."""

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """Write the merged weights and config.json; raises UserError for one that is too large."""
        write_shards(checked(dense_tensors(trained, torch.float16)), folder)
        write_config(trained.base_folder, folder, dense_config(trained, torch.float16))
        return form_of(trained)


def checked(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors; raises UserError for one with numbers that float16 has no place for."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name}: its largest number is beyond float16's {LARGEST:.0f}; export bf16"
            )
        yield name, tensor


EXPORTERS = {"fp16": Fp16Exporter()}
