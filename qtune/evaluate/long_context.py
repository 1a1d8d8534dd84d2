"""What a model loses by keys and values in few bits, over long rows of held-out text.

A row is read piece by piece, as an answer grows token by token: what lies further back than the
newest tokens comes from the cache. The same pieces go past an ordinary cache, so both losses are of
the same tokens, and their distributions can be compared token by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache, PretrainedConfig

from qtune.evaluate.mode import measuring
from qtune.model.forward import inner_model
from qtune.model.kv_cache import GROUP, RECENT, cache_bytes, packed_cache

# tokens that are read at a time, and most in all
PIECE = 128
MOST_TOKENS = 4096
# the first piece before which something is packed
FIRST = -(-(RECENT + GROUP) // PIECE) * PIECE


@dataclass(frozen=True, kw_only=True)
class CacheEffect:
    """Mean losses, and KL(16-bit cache || packed one) per token, of `tokens` tokens.

    Only tokens with a packed past count, in rows of at most `context`. The bytes are those that a
    cache of `context` tokens takes.
    """

    bits: int
    context: int
    tokens: int
    loss: float
    loss_16bit: float
    kl: float
    top1: float
    cache_bytes: int
    cache_bytes_16bit: int


def long_rows(texts: Sequence[Sequence[int]], config: PretrainedConfig) -> list[Tensor]:
    """Token rows [1, L] int64 of texts joined, as long as the model takes; none of too little."""
    length = min(getattr(config, "max_position_embeddings", MOST_TOKENS), MOST_TOKENS)
    joined = torch.tensor([id for text in texts for id in text][:MOST_TOKENS]).unsqueeze(0)
    rows = joined.split(length, 1)
    return [row for row in rows if row.shape[1] > FIRST + 1]


def cache_effect(model: nn.Module, rows: Sequence[Tensor], bits: int) -> CacheEffect:
    """What keys and values in `bits` bits do to these token rows [1, L], of which there is one."""
    inner = inner_model(model)
    losses, losses_16bit, divergences, agreed = [], [], [], []
    with measuring(model):
        for row in rows:
            caches = packed_cache(inner.config, bits), DynamicCache(config=inner.config)
            for found, truth, targets in _pieces(model, row.to(inner.device), caches):
                losses.append(cross_entropy(found, targets, reduction="none"))
                losses_16bit.append(cross_entropy(truth, targets, reduction="none"))
                divergences.append(_divergence(truth, found))
                agreed.append((truth.argmax(-1) == found.argmax(-1)).float())
            if row is rows[0]:
                sizes = [cache_bytes(cache) for cache in caches]
    return CacheEffect(
        bits=bits,
        context=rows[0].shape[1],
        tokens=sum(map(len, losses)),
        loss=_mean(losses),
        loss_16bit=_mean(losses_16bit),
        kl=_mean(divergences),
        top1=_mean(agreed),
        cache_bytes=sizes[0],
        cache_bytes_16bit=sizes[1],
    )


def _pieces(
    model: nn.Module, row: Tensor, caches: tuple[DynamicCache, DynamicCache]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Float32 logits [n, V] past either cache, and targets [n], where a part of the past is packed.

    Up to there the caches are alike, and one pass would do; the rows are long.
    """
    for first in range(0, row.shape[1] - 1, PIECE):
        piece, targets = row[:, first : first + PIECE], row[0, first + 1 : first + PIECE + 1]
        found, truth = (
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0].float()
            for cache in caches
        )
        if first >= FIRST:
            yield found[: len(targets)], truth[: len(targets)], targets


def _divergence(truth: Tensor, found: Tensor) -> Tensor:
    """KL(truth || found) [n] of logits [n, V]."""
    p, q = (logits.log_softmax(-1) for logits in (truth, found))
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _mean(parts: Sequence[Tensor]) -> float:
    return torch.cat(list(parts)).mean(dtype=torch.float64).item()
