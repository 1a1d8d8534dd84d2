"""Conversations to token ids and the mask of what is learned, by the model's own chat template.

A conversation is rendered once to text and tokenised once, without added special tokens (the
template has written them); the mask comes from character positions. So the ids are those of the
prompt at inference, no second BOS is added, and a padding token that equals the end token is no
trouble. Where the assistant's characters are is decided in `spans.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2 import TemplateError

from qtune.data.rows import Problems, Row
from qtune.data.spans import (
    Message,
    Render,
    RenderError,
    Span,
    SpanError,
    assistant_spans,
    has_markers,
    marked_spans,
)
from qtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Sample:
    """A tokenised row: `supervised[i]` says whether `ids[i]` is a training target.

    `num_cut` is the number of tokens left out because the row was too long.
    """

    row: Row
    ids: list[int]
    supervised: list[bool]
    num_cut: int = 0


def encode(
    tokenizer: "Tokenizer",
    row: Row,
    *,
    train_on: TrainOn = "assistant",
    max_length: int,
    truncate: bool = False,
) -> Sample:
    """The row as ids and mask, at most `max_length` tokens.

    Raises UserError, naming the row, where the template refuses the conversation, where what the
    assistant wrote cannot be located, and where the row is too long and must not be cut.
    """
    try:
        text = _renderer(tokenizer)(row.messages)
        spans = _trained_spans(tokenizer, row.messages, text, train_on)
    except RenderError as error:
        raise UserError(
            f"{row.place}: the model's chat template refuses this conversation: {error}"
        ) from error
    except SpanError as error:
        raise UserError(
            f"{row.place}: cannot tell which tokens are the assistant's: {error}. Strip white "
            "space around the messages, take a template with {% generation %} markers, or set "
            "data.train_on: all"
        ) from error
    ids, offsets = _tokenise(tokenizer, text)
    num_cut = max(0, len(ids) - max_length)
    if num_cut and not truncate:
        raise UserError(
            f"{row.place}: {len(ids)} tokens, but data.max_length is {max_length}; raise it, "
            "shorten the row, or cut it with data.truncate: true"
        )
    supervised = _mask(offsets, spans)
    return Sample(row, ids[:max_length], supervised[:max_length], num_cut)


def encode_all(
    tokenizer: "Tokenizer",
    rows: Sequence[Row],
    *,
    train_on: TrainOn = "assistant",
    max_length: int,
    truncate: bool = False,
) -> list[Sample]:
    """Every row encoded. Raises UserError with up to ten rows that cannot be."""
    template_of(tokenizer)
    problems = Problems()
    samples = []
    for row in rows:
        try:
            sample = encode(
                tokenizer, row, train_on=train_on, max_length=max_length, truncate=truncate
            )
        except UserError as error:
            problems.add(row.place, str(error).removeprefix(f"{row.place}: "))
        else:
            samples.append(sample)
    problems.raise_if_any()
    return samples


def prompt_ids(tokenizer: "Tokenizer", messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and the header of the answer to come.

    Raises UserError where the template refuses them.
    """
    try:
        text = _renderer(tokenizer)(messages, add_generation_prompt=True)
    except RenderError as error:
        raise UserError(f"the model's chat template refuses the messages: {error}") from error
    return _tokenise(tokenizer, text)[0]


def template_of(tokenizer: "Tokenizer") -> str:
    """The chat template as Jinja source. Raises UserError where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: take the instruct version of the model, or put a "
            "chat_template.jinja into its folder"
        )
    template: str = tokenizer.get_chat_template()
    return template


def template_hash(tokenizer: "Tokenizer") -> str:
    """SHA-256 of the chat template, in hex: two runs with the same hash saw the same format."""
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()


def special_tokens(tokenizer: "Tokenizer") -> dict[int, str]:
    """Ids and text of the tokens that control the conversation (BOS, turn headers, terminators)."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return named | added


def _renderer(tokenizer: "Tokenizer") -> Render:
    template_of(tokenizer)

    def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        # A template may also add None to a string, or be given no messages at all.
        except (TemplateError, TypeError, ValueError) as error:
            raise RenderError(str(error)) from error
        return cast(str, text)

    return render


def _trained_spans(
    tokenizer: "Tokenizer", messages: Sequence[Message], text: str, train_on: TrainOn
) -> list[Span]:
    if train_on == "all":
        return [(0, len(text))]
    special = list(special_tokens(tokenizer).values())
    spans = _own_markers(tokenizer, messages, text)
    if spans:
        spans = marked_spans(spans, text, special)
    else:
        spans = assistant_spans(_renderer(tokenizer), messages, text, special)
    return spans[-1:] if train_on == "last" else spans


def _own_markers(tokenizer: "Tokenizer", messages: Sequence[Message], text: str) -> list[Span]:
    """Spans within the template's `{% generation %}` markers; empty where it has none."""
    # Imported here: the package takes seconds, and the demo and the checks do without it.
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_of(tokenizer)
    if not has_markers(template):
        return []
    variables: dict[str, Any] = {**tokenizer.special_tokens_map}
    rendered = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **variables,
    )
    texts, spans = cast(tuple[list[str], list[list[Span]]], rendered)
    return [(start, end) for start, end in spans[0]] if texts[0] == text else []


def _tokenise(tokenizer: "Tokenizer", text: str) -> tuple[list[int], list[Span]]:
    """Ids and character offsets, with nothing added to the text."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer has no tokenizer.json: only fast tokenizers are supported")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Per token, whether it has characters in a span; never the first, which nothing predicts."""
    mask = []
    remaining = list(reversed(spans))
    for position, (start, end) in enumerate(offsets):
        while remaining and remaining[-1][1] <= start:
            remaining.pop()
        inside = bool(remaining) and start < end and end > remaining[-1][0]
        mask.append(inside and position > 0)
    return mask
