"""The one way to call a causal LM on a Batch: logits at the supervised tokens and nowhere else.

Or the hidden states there, for a loss that does not need the logits (`model/head.py`).

A model that runs with `qtune_packed` attention sees the batch as the single row it is. Every other
model (plain SDPA, flash, recurrent layers), and every batch that is not to be packed, comes as one
sample per row, filled up on the right to a multiple of 8: a causal model never sees what comes
after, so this is right for all of them and leans on no model's own detection of packed rows.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from qtune.data.collate import Batch
from qtune.data.order import padded_length
from qtune.errors import UserError
from qtune.model import attention

# lengths of the two samples of the check, and a step through the vocabulary that visits all of it
PROBE = (6, 10)
PRIME = 7919
# nats per token: 16-bit rounding makes 0.01, another sample in sight about 1
MOST_DIVERGENCE = 0.1
# of what one rounding makes in a base that 2 bits have ruined; every layer rounds
MOST_ROUNDINGS = 3


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, V] in the model's dtype; row n predicts `batch.targets[n]`. Gradients flow."""
    return _forward(model, batch, _logits_at)


def forward_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states [N, I] of the base model; row n predicts `targets[n]`. Gradients flow."""
    return _forward(model, batch, _hidden_at)


def packs(model: nn.Module) -> bool:
    """Whether the model can see several samples in one row, each as if it were alone."""
    inner = inner_model(model)
    # a recurrent layer carries its state over the border between samples
    return inner.config._attn_implementation == attention.NAME and not inner._is_stateful


def check_packing(model: nn.Module) -> None:
    """Raises UserError where a sample in a packed row gets other logits than it gets alone.

    The truth is transformers' plainest attention, with one sample per row. It costs two passes over
    a few tokens; a model that does not run packed is right by construction and is not run.
    """
    inner = inner_model(model)
    if not packs(inner):
        return
    first, second = PROBE
    ids = torch.arange(1, first + second + 1, device=inner.device) * PRIME
    ids %= inner.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(first), torch.arange(second)]).to(inner.device)
    with torch.no_grad():
        separate = attention.packed_inputs(positions[None], PROBE)
        packed = model(input_ids=ids[None], **separate).logits[0, first:]
        inner.set_attn_implementation("eager")
        alone = model(input_ids=ids[None, first:], use_cache=False).logits[0]
        rounding = _divergence(alone, _rounded_once_more(model, inner, ids[None, first:]))
        inner.set_attn_implementation(attention.NAME)
    difference = float(_divergence(alone, packed))
    if not difference <= max(MOST_DIVERGENCE, MOST_ROUNDINGS * float(rounding)):
        raise UserError(
            f"{type(inner).__name__} cannot be trained on packed rows: a sample gets other "
            f"predictions there than alone (KL {difference:.2f}); please report this model"
        )


def _rounded_once_more(model: nn.Module, inner: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [T, V] of ids [1, T] with embeddings that are off by as much as their dtype rounds."""
    embedded = inner.get_input_embeddings()(ids)
    up_or_down = torch.arange(embedded.numel(), device=ids.device).view_as(embedded) % 2 * 2 - 1
    moved = embedded * (1 + up_or_down.to(embedded.dtype) * torch.finfo(embedded.dtype).eps)
    logits: Tensor = model(inputs_embeds=moved, use_cache=False).logits[0]
    return logits


def _divergence(truth: Tensor, found: Tensor) -> Tensor:
    """Mean over rows of KL(truth || found) between the distributions of logits [N, V]."""
    p, q = (logits.float().log_softmax(-1) for logits in (truth, found))
    return kl_div(q, p, reduction="batchmean", log_target=True)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers for parallel training, compilation and adapters."""
    inner = model
    # unwrapping goes through all modules in search of compiled ones
    if not isinstance(model, (PeftModel, PreTrainedModel)):
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    return cast(PreTrainedModel, inner)


def takes_logits_to_keep(inner: nn.Module) -> bool:
    """Whether the model's forward can restrict itself to the logits of given columns."""
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def _forward(model: nn.Module, batch: Batch, outputs_at: Callable[..., Tensor]) -> Tensor:
    inner = inner_model(model)
    if not (batch.packing and packs(inner)):
        return _one_per_row(model, inner, batch, outputs_at)
    separate = attention.packed_inputs(batch.position_ids, batch.lengths)
    return outputs_at(model, inner, batch.predicts, input_ids=batch.input_ids, **separate)[0]


def _one_per_row(
    model: nn.Module, inner: PreTrainedModel, batch: Batch, outputs_at: Callable[..., Tensor]
) -> Tensor:
    column = batch.position_ids[0]  # [T]
    lengths = column.new_tensor(batch.lengths)
    row = torch.repeat_interleave(lengths, output_size=len(column))  # [T]
    longest = padded_length(max(batch.lengths))
    ids = column.new_zeros(len(batch.lengths), longest)  # [S, longest]
    ids[row, column] = batch.input_ids[0]
    columns, at = _distinct(column[batch.predicts], longest)
    # without a mask attention may take its fastest path, which knows of the diagonal only
    outputs = outputs_at(model, inner, columns, input_ids=ids, use_cache=False)
    return outputs[row[batch.predicts], at]


def _distinct(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Every column once, and where each of those given is among them."""
    if columns.is_meta:
        # nothing there says which: at most all of them
        return columns.new_empty(width), columns
    found: tuple[Tensor, Tensor] = torch.unique(columns, return_inverse=True)
    return found


def _logits_at(model: nn.Module, inner: nn.Module, columns: Tensor, **inputs: Any) -> Tensor:
    """Logits [S, len(columns), V], made for these columns only where the model knows how."""
    if takes_logits_to_keep(inner):
        kept: Tensor = model(logits_to_keep=columns, **inputs).logits
        return kept
    everywhere: Tensor = model(**inputs).logits
    return everywhere[:, columns]


def _hidden_at(model: nn.Module, inner: PreTrainedModel, columns: Tensor, **inputs: Any) -> Tensor:
    """Hidden states [S, len(columns), I].

    The model is called from its outermost wrapper on, as for logits: wrappers for parallel training
    prepare the backward pass there. Only what the innermost does is cut short.
    """

    def base_only(**given: Any) -> Tensor:
        # wrappers pass on arguments of the whole model that nobody has set
        given = {name: value for name, value in given.items() if value is not None}
        hidden: Tensor = inner.base_model(**given)[0]
        return hidden

    with _forward_replaced(inner, base_only):
        everywhere: Tensor = model(**inputs)
    return everywhere[:, columns]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward function for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
