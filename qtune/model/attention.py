"""Causal attention over samples that lie end to end in a single row, none seeing another.

Batches are rows without padding: `position_ids` restart at every sample, and `sample_lengths` says
how long each is. Where there is a kernel for such rows (qtune_kernels.attention), it gets them as
they are. Elsewhere the samples are laid side by side and filled up to the longest for PyTorch's
SDPA; under a causal mask the filling is never seen. Where lengths differ too much for that, each
run of samples of similar length gets its own call. On the CPU SDPA runs in float32: there PyTorch's
bf16 kernels take three times as long, mostly backward.

Without `sample_lengths` (generation, ordinary padded batches) the call goes to transformers' SDPA
path unchanged, masks and caches included. Models that do more across tokens than masked softmax
attention (soft caps, sinks, chunks, convolutions, recurrence) keep their own code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qtune_kernels import attention as kernels

NAME = "qtune_packed"
# most positions of the boxes laid side by side, over the tokens there are
MOST_FILLING = 1.5
# what the layers of a model may be for packed rows to be exact
KINDS = {"full_attention", "sliding_attention"}
_meta_stands_for = ContextVar("_meta_stands_for", default="meta")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, H, D] of query [1, H, T, D] and key, value [1, H or fewer, T, D]."""
    if sample_lengths is None:
        kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # [T, H, D]; squeezing has a cheaper gradient than indexing
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    sizes, scale = list(sample_lengths), query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0 and kernels.is_fused(q, k, v, scale, _device_type(query)):
        y, _ = kernels.packed_attention(q, k, v, sizes, scale, sliding_window or 0)
    else:
        y = _sdpa(q, k, v, sizes, scale=scale, dropout=dropout, window=sliding_window)
    return y.unsqueeze(0), None


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Let tensors on `meta` stand for those on a device of that type, and go the way they would."""
    before = _meta_stands_for.set(device)
    try:
        yield
    finally:
        _meta_stands_for.reset(before)


def _device_type(tensor: Tensor) -> str:
    return _meta_stands_for.get() if tensor.is_meta else tensor.device.type


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """Attention [T, H, D] within samples of those sizes, by PyTorch."""
    call, dtype = partial(_causal, **options), q.dtype
    if _device_type(q) == "cpu":
        q, k, v = (t.float() for t in (q, k, v))
    runs = _runs(sizes)
    parts = zip(*(t.split([sum(run) for run in runs]) for t in (q, k, v)), runs, strict=True)
    y = torch.cat([_side_by_side(call, *part) for part in parts])
    return y.to(dtype)


def _runs(sizes: list[int]) -> list[list[int]]:
    """The sizes in runs of neighbours that can lie side by side without too much filling."""
    runs: list[list[int]] = []
    for size in sizes:
        longer = [*runs[-1], size] if runs else [size]
        if runs and max(longer) * len(longer) <= MOST_FILLING * sum(longer):
            runs[-1] = longer
        else:
            runs.append([size])
    return runs


def _side_by_side(
    call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, sizes: list[int]
) -> Tensor:
    """Attention [T, H, D] within samples of those sizes, in one call over [S, H, longest, D]."""
    longest = max(sizes)
    places = _places(tuple(sizes), q.device)
    boxes = [
        t.new_zeros(len(sizes) * longest, *t.shape[1:]).index_put((places,), t)
        if min(sizes) < longest
        else t
        for t in (q, k, v)
    ]
    y = call(*(box.unflatten(0, (len(sizes), longest)).transpose(1, 2) for box in boxes))
    return y.transpose(1, 2).flatten(0, 1).index_select(0, places)


@lru_cache(maxsize=4)
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token of a packed row lies in boxes as long as the longest sample, int64 [T]."""
    starts = (box * max(sizes) for box in range(len(sizes)))
    return torch.cat(
        [torch.arange(at, at + n, device=device) for at, n in zip(starts, sizes, strict=True)]
    )


def _causal(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float, window: int | None
) -> Tensor:
    """Causal attention [S, H, T, D], each query seeing at most `window` keys."""
    options: dict[str, Any] = {"is_causal": True}
    if window is not None and q.shape[2] > window:
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at[None, :]
        options = {"attn_mask": (distance >= 0) & (distance < window)}
    options |= {"scale": scale, "dropout_p": dropout, "enable_gqa": True}
    return scaled_dot_product_attention(q, k, v, **options)


def packed_inputs(position_ids: Tensor, sample_lengths: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments that make a model's forward see a packed row [1, T] as separate samples.

    The mask is 4-D, so that transformers builds none of its own [T, T], and hides everything, so
    that a model that does not come by `packed_attention` shows it at once.
    """
    return {
        "position_ids": position_ids,
        "sample_lengths": tuple(sample_lengths),
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device),
        "use_cache": False,
    }


def use_packed(model: PreTrainedModel) -> None:
    """Let the model attend by `packed_attention`, if all its layers do across tokens is that."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    plain = model._supports_sdpa and model._can_set_attn_implementation()
    if plain and not model._is_stateful and KINDS.issuperset(kinds):
        model.set_attn_implementation(NAME)


def register() -> None:
    """Make transformers know the attention `qtune_packed`; calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
