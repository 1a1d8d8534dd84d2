"""Rows to token ids and a weight for each token, by the model's own chat template.

A conversation is rendered once to text and tokenised once; the weights come from character
positions. How the template is run is decided in `template.py`, what must not get lost in
`presented.py`, where the assistant's characters are in `spans.py`, what of them is learned in
`learned.py`, and what becomes of texts without a conversation in `plain.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from qtune.data.learned import all_spans, answer_spans, learns_all, message_weights
from qtune.data.plain import encode_plain, split, text_ids
from qtune.data.presented import Tools, presented
from qtune.data.rows import Message, Row
from qtune.data.sample import Sample
from qtune.data.spans import Rendered, RenderError, Span, SpanError
from qtune.data.template import marks, renderer, template_hash
from qtune.data.tokens import Weighted, special_tokens, token_weights, tokenise
from qtune.errors import UserError
from qtune.recipe_data import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "continues_prompt",
    "encode",
    "end_of_turn",
    "prompt_ids",
    "special_tokens",
    "template_hash",
]


def encode(tokenizer: "Tokenizer", row: Row, *, settings: Data) -> list[Sample]:
    """The row as samples: one; none where it is dropped; several where plain text is split.

    Raises UserError, naming the row, where the template refuses the conversation or loses a part of
    it, where what the assistant wrote cannot be located, and where the row is too long.
    """
    sample = replace(_encode(tokenizer, row, row.messages, settings), label=row.label)
    if row.rejected is not None:
        rejected = _encode(tokenizer, row, row.rejected, settings)
        sample = replace(sample, rejected=rejected)
    return _fitted(tokenizer, row, sample, settings)


def prompt_ids(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    tools: Tools | None = None,
    plain: bool = False,
) -> list[int]:
    """Token ids of the messages and the header of the answer to come; of the bare texts if `plain`.

    Raises UserError where the template refuses them.
    """
    if plain:
        texts = [message["content"] for message in messages]
        return list(chain.from_iterable(text_ids(tokenizer, texts)))
    try:
        form = presented(partial(renderer, tokenizer), messages, tools)
        text = renderer(tokenizer, tools)(form, add_generation_prompt=True)
    except RenderError as error:
        raise UserError(f"the model's chat template refuses the messages: {error}") from error
    return tokenise(tokenizer, text)[0]


def continues_prompt(tokenizer: "Tokenizer", row: Row) -> bool:
    """Whether the row's text goes on where the prompt for its last answer ends.

    It does not under templates that open a thought for every answer to come, but show given ones
    without theirs (DeepSeek-R1). Raises UserError where the template refuses the row.
    """
    prompt = prompt_ids(tokenizer, row.messages[:-1], row.tools, row.plain)
    (sample,) = encode(tokenizer, row, settings=Data(train=row.source, max_length=1 << 31))
    return list(sample.ids[: len(prompt)]) == prompt


def end_of_turn(tokenizer: "Tokenizer") -> int | None:
    """The special token that ends an answer in the chat template; None where none does."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = Row("a question and its answer", 1, messages)
    (sample,) = encode(tokenizer, row, settings=Data(train=row.source, max_length=1 << 20))
    last = [token for token, weight in zip(sample.ids, sample.weights, strict=True) if weight][-1]
    return last if last in special_tokens(tokenizer) else None


def _encode(
    tokenizer: "Tokenizer", row: Row, messages: Sequence[Message], settings: Data
) -> Sample:
    """One conversation of the row, whole, however long."""
    weights = message_weights(row, messages, settings)
    if row.plain:
        return encode_plain(tokenizer, row.place, messages, weights)
    try:
        form = presented(partial(renderer, tokenizer), messages, row.tools)
        text = renderer(tokenizer, row.tools)(form)
        spans = _weighted_spans(tokenizer, row, form, text, weights, settings)
    except RenderError as error:
        raise UserError(
            f"{row.place}: the model's chat template refuses this conversation: {error}"
        ) from error
    except SpanError as error:
        raise UserError(
            f"{row.place}: cannot tell which tokens are the assistant's: {error}; take another "
            "template as data.template, or set data.train_on: all"
        ) from error
    ids, offsets = tokenise(tokenizer, text)
    return Sample(row.place, ids, token_weights(ids, offsets, spans, special_tokens(tokenizer)))


def _weighted_spans(
    tokenizer: "Tokenizer",
    row: Row,
    messages: Sequence[Message],
    text: str,
    weights: Sequence[float],
    settings: Data,
) -> list[Weighted]:
    """Spans of the rendered text with their weights, in order and apart."""
    special = list(special_tokens(tokenizer).values())
    rendered = Rendered(renderer(tokenizer, row.tools), messages, text, special)
    if learns_all(row, settings):
        return all_spans(len(text), weights, partial(_message_span, rendered))
    marked = marks(tokenizer, messages, row.tools, text)
    if marked:
        return answer_spans(rendered.within(marked), weights)
    return answer_spans({turn: [span] for turn, span in rendered.answers().items()}, weights)


def _message_span(rendered: Rendered, index: int) -> Span:
    """Where any message lies: an assistant's with its terminator, the content of the others."""
    if rendered.messages[index]["role"] == "assistant":
        return rendered.answers()[index]
    return rendered.content(index)


def _fitted(tokenizer: "Tokenizer", row: Row, sample: Sample, settings: Data) -> list[Sample]:
    """What becomes of the sample under data.max_length."""
    limit, overlong = settings.max_length, settings.overlong
    longest = max(len(part.ids) for part in sample.parts)
    if longest <= limit:
        return [sample]
    if overlong == "drop":
        return []
    if overlong == "truncate":
        rejected = sample.rejected and _cut(sample.rejected, limit)
        return [replace(_cut(sample, limit), rejected=rejected)]
    splits = overlong == "split"
    if splits and row.plain and len(row.messages) == 1 and row.rejected is None:
        return split(sample, limit, tokenizer.bos_token_id)
    raise UserError(
        f"{row.place}: {longest} tokens, but data.max_length is {limit}"
        + (", and only rows of plain text are split" if splits else "")
        + "; raise it, shorten the row, or set data.overlong: truncate or drop"
    )


def _cut(sample: Sample, limit: int) -> Sample:
    num_cut = max(0, len(sample.ids) - limit)
    return replace(sample, ids=sample.ids[:limit], weights=sample.weights[:limit], num_cut=num_cut)
