"""Rows without a conversation: texts that go to the model as they are, for continued pretraining.

BOS comes as the tokenizer puts it before any text, and EOS is appended and learned, or the model
would not know where a text ends.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from qtune.data.rows import Message
from qtune.data.sample import Sample
from qtune.data.tokens import tokenise
from qtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def text_ids(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, the first with BOS where the tokenizer adds one, none with EOS.

    Texts are tokenised apart, so that the ids of a prompt do not depend on what follows it.
    """
    first, *rest = texts
    ids, _ = tokenise(tokenizer, first, add_special_tokens=True)
    while ids and ids[-1] == tokenizer.eos_token_id and not first.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return [ids, *(_continued(tokenizer, text) for text in rest)]


def encode_plain(
    tokenizer: "Tokenizer", place: str, messages: Sequence[Message], weights: Sequence[float]
) -> Sample:
    """The texts and EOS as one sample; `weights` has one for each text.

    Raises UserError where the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{place}: the tokenizer has no end token, which a text has to end with")
    parts = text_ids(tokenizer, [message["content"] for message in messages])
    parts[-1] = [*parts[-1], tokenizer.eos_token_id]
    spread = [weight for part, weight in zip(parts, weights, strict=True) for _ in part]
    return Sample(place, list(chain.from_iterable(parts)), [0.0, *spread[1:]])


def split(sample: Sample, max_length: int, bos_token_id: int | None) -> list[Sample]:
    """The text in samples of at most `max_length` tokens, each target in exactly one of them.

    Each goes on with BOS where the text begins with it (models lean on it, Gemma badly so), and
    otherwise with the last token of the one before.
    """
    has_bos = sample.ids[0] == bos_token_id
    context = [sample.ids[0]] if has_bos else []
    step = max_length - 1
    pieces = []
    for start in range(1, len(sample.ids), step):
        lead = context or [sample.ids[start - 1]]
        ids = [*lead, *sample.ids[start : start + step]]
        weights = [0.0, *sample.weights[start : start + step]]
        pieces.append(replace(sample, ids=ids, weights=weights))
    return pieces


def _continued(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Ids of a text in the middle, without the blank that some tokenizers put before any text."""
    ids, offsets = tokenise(tokenizer, "\n" + text)
    if any(end == 1 for _, end in offsets):
        return [i for i, (start, _) in zip(ids, offsets, strict=True) if start >= 1]
    return tokenise(tokenizer, text)[0]
