"""Merged weights in 16 bits: what `bf16`, `fp16` and all that is made of the merge share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qtune.export.folder.trained import Trained
from qtune.model.checkpoint import stored_dtype, weight_files
from qtune.model.merge import merged_tensors, untied


def dense_tensors(
    trained: Trained, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged tensor of all weights, in the dtype of `dense_dtype`, or in another one."""
    return merged_tensors(
        trained.base_folder,
        trained.model,
        trained.onto,
        start=trained.start,
        round_to=trained.round_to,
        dtype=dtype,
    )


def dense_bytes(trained: Trained) -> int:
    """The bytes of the weights in 16 bits."""
    parameters = trained.base.parameters()
    stored = sum(path.stat().st_size for path in weight_files(trained.base_folder))
    return max(stored, sum(p.numel() * 2 for p in parameters if p.dtype != torch.uint8))


def dense_dtype(trained: Trained) -> torch.dtype:
    """The dtype of merged weights: that of training for a base in float32, else the base's own."""
    return trained.round_to or stored_dtype(trained.base_folder)


def dense_config(trained: Trained, dtype: torch.dtype) -> dict[str, Any]:
    """What merged weights in `dtype` change in config.json."""
    changes: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    return changes | ({"tie_word_embeddings": False} if untied(trained.model) else {})


def form_of(trained: Trained) -> dict[str, Any]:
    """What qtune.json says of the form of a merge."""
    return {"form": "merged", "onto": trained.onto}
