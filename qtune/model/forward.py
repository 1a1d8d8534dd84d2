"""The one way to call a causal LM on a Batch: logits at the supervised tokens and nowhere else.

A model that runs with `qtune_packed` attention sees the batch as the single row it is. Every other
model (plain SDPA, flash, recurrent layers) gets one sample per row, filled up on the right: a
causal model never sees what comes after, so this is right for all of them and leans on no model's
own detection of packed rows.
"""

import inspect
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.data.collate import Batch
from qtune.model import attention


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, V] in the model's dtype; row n predicts `batch.targets[n]`. Gradients flow."""
    inner = inner_model(model)
    return _packed(model, inner, batch) if _packs(inner) else _one_per_row(model, inner, batch)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers for parallel training, compilation and adapters."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    return cast(PreTrainedModel, inner)


def takes_logits_to_keep(inner: nn.Module) -> bool:
    """Whether the model's forward can restrict itself to the logits of given columns."""
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def _packed(model: nn.Module, inner: PreTrainedModel, batch: Batch) -> Tensor:
    separate = attention.packed_inputs(batch.position_ids, batch.lengths)
    return _logits_at(model, inner, batch.predicts, input_ids=batch.input_ids, **separate)[0]


def _one_per_row(model: nn.Module, inner: PreTrainedModel, batch: Batch) -> Tensor:
    column = batch.position_ids[0]  # [T]
    row = torch.repeat_interleave(column.new_tensor(batch.lengths))  # [T]
    ids = column.new_zeros(len(batch.lengths), max(batch.lengths))  # [S, longest]
    live = torch.zeros_like(ids)
    ids[row, column], live[row, column] = batch.input_ids[0], 1
    columns, at = torch.unique(column[batch.predicts], return_inverse=True)
    logits = _logits_at(model, inner, columns, input_ids=ids, attention_mask=live, use_cache=False)
    return logits[row[batch.predicts], at]


def _logits_at(model: nn.Module, inner: nn.Module, columns: Tensor, **inputs: Any) -> Tensor:
    """Logits [S, len(columns), V], made for these columns only where the model knows how."""
    if takes_logits_to_keep(inner):
        kept: Tensor = model(logits_to_keep=columns, **inputs).logits
        return kept
    everywhere: Tensor = model(**inputs).logits
    return everywhere[:, columns]


def _packs(inner: PreTrainedModel) -> bool:
    # a recurrent layer carries its state over the border between samples
    return inner.config._attn_implementation == attention.NAME and not inner._is_stateful
