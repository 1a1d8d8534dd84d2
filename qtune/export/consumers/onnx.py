"""ONNX Runtime behind the face of a transformers model.

A graph takes keys and values of before and gives them back grown. Rows run one by one when they are
new, since a graph gives logits of every place, and all together when each has grown by one token,
as in `generate`. Then they are padded on the right, as the attention operator wants it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from qtune.errors import UserError
from qtune.export.consumers.engine import EngineModel, Rows, made_ready

PAST = "past_key_values."
Array = NDArray[Any]
# arrays [B, heads, length, size] in the order of the graph, whose first output are the logits
Cache = list[Array]


class OnnxModel(EngineModel):
    """A decoder in ONNX Runtime; `session` runs its graph."""

    def __init__(self, config: Any, session: Any) -> None:
        super().__init__(config)
        self.session = session
        past = [entry for entry in session.get_inputs() if entry.name.startswith(PAST)]
        self._names = [entry.name for entry in past]
        self._sizes = [(entry.shape[1], entry.shape[3]) for entry in past]
        # what the last call was of, and its keys and values: of each row, or of all in one
        self._ids: list[list[int]] = []
        self._caches: list[Cache] = []

    def row_logits(self, rows: Rows, wanted: Rows) -> Tensor:
        """Logits, float32 [N, V], of rows of ids at their `wanted` places, row after row."""
        ids = [list(row) for row in rows]
        found = self._next(ids, wanted) if self._goes_on(ids, wanted) else self._new(ids, wanted)
        self._ids = ids
        return found

    def _goes_on(self, ids: list[list[int]], wanted: Rows) -> bool:
        """Whether each row is the one of before and a token, whose logits alone are wanted."""
        last = all(list(at) in ([], [len(row) - 1]) for row, at in zip(ids, wanted, strict=True))
        return last and [row[:-1] for row in ids] == self._ids

    def _new(self, ids: list[list[int]], wanted: Rows) -> Tensor:
        self._caches, found = [], []
        for row, at in zip(ids, wanted, strict=True):
            empty = [np.zeros((1, n, 0, size), np.float32) for n, size in self._sizes]
            logits, cache = self._run(np.array([row]), [len(row)], empty)
            self._caches.append(cache)
            found.append(logits[0, list(at)])
        return torch.from_numpy(np.concatenate(found))

    def _next(self, ids: list[list[int]], wanted: Rows) -> Tensor:
        past = self._caches[0] if len(self._caches) == 1 else _joined(self._caches)
        new = np.array([row[-1:] for row in ids])
        logits, cache = self._run(new, [len(row) for row in ids], past)
        self._caches = [cache]
        live = [bool(at) for at in wanted]
        return torch.from_numpy(logits[live, 0])

    def _run(self, ids: Array, lengths: list[int], past: Cache) -> tuple[Array, Cache]:
        """Logits [B, T, V] and the grown cache of ids [B, T], with which rows are that long."""
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        logits, *cache = self.session.run(None, feeds | dict(zip(self._names, past, strict=True)))
        return logits, cache


def load(folder: Path) -> OnnxModel:
    """The model in an exported folder, on the CPU; UserError: ONNX Runtime refuses it."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = folder / "model.onnx"
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile) as error:
        raise UserError(f"ONNX Runtime does not load {path}: {error}") from error
    model = OnnxModel(AutoConfig.from_pretrained(folder), session)
    made_ready(model, folder)
    return model


def _joined(caches: list[Cache]) -> Cache:
    """The caches of single rows as one, padded on the right."""
    length = max(cache[0].shape[2] for cache in caches)
    return [
        np.concatenate([_padded(array, length) for array in arrays])
        for arrays in zip(*caches, strict=True)
    ]


def _padded(array: Array, length: int) -> Array:
    return np.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, 0)))
