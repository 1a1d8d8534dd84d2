"""Text to token ids and a weight for each token, by the tokenizer's character positions.

Rendered text is tokenised in one piece, without added special tokens (the template has written
them). So the ids are those of the prompt at inference, no second BOS is added, and a padding token
that equals the end token is no trouble.
"""

from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from qtune.data.spans import Span
from qtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Weighted = tuple[int, int, float]


def tokenise(
    tokenizer: "Tokenizer", text: str, *, add_special_tokens: bool = False
) -> tuple[list[int], list[Span]]:
    """Ids and (start, end) in `text` per token. Raises UserError for a slow tokenizer."""
    check_fast(tokenizer)
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_token_type_ids=False,
        verbose=False,
    )
    return cast(list[int], encoded["input_ids"]), cast(list[Span], encoded["offset_mapping"])


def check_fast(tokenizer: "Tokenizer") -> None:
    """Raises UserError for a slow tokenizer, which does not tell where its tokens are in a text."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer has no tokenizer.json: only fast tokenizers are supported")


def special_tokens(tokenizer: "Tokenizer") -> Mapping[int, str]:
    """Ids and text of the tokens that control the conversation (BOS, turn headers, terminators)."""
    return _special_tokens(tokenizer, len(tokenizer))


def token_weights(
    ids: Sequence[int],
    offsets: Sequence[Span],
    spans: Sequence[Weighted],
    special: Container[int],
) -> list[float]:
    """Per token the largest weight of a span it has characters in; 0 for the first token.

    `spans` are (start, end, weight), in order and apart. Nothing predicts the first token. A
    special token counts where it begins: some tokenizers let it swallow the white space behind it.
    """
    weights = []
    first = 0
    for position, (start, end) in enumerate(offsets):
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        until = start + 1 if ids[position] in special else end
        weight = 0.0
        for begin, stop, value in spans[first:]:
            if begin >= until:
                break
            weight = max(weight, value if start < min(end, stop) else 0.0)
        weights.append(weight if position else 0.0)
    return weights


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: "Tokenizer", num_tokens: int) -> Mapping[int, str]:
    """Kept until tokens are added, as Gemma 3's thousands of them take milliseconds."""
    ids = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return MappingProxyType(dict(ids) | added)
