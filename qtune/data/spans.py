"""Which characters of a rendered conversation the assistant wrote: verified, never guessed.

A chat template is a program that may do anything with the messages, so each assistant turn is
located by the first of three ways whose result can be checked against the full rendering:

1. markers: the template itself says `{% generation %}`;
2. prefix difference: the conversation before the turn, with the generation prompt, and the
   conversation up to the turn must both be beginnings of the full rendering; the turn lies between;
3. sentinels: private-use characters around the content, accepted only if taking them out gives back
   the full rendering. (Templates that drop the thoughts of earlier turns need this one.)

Spans end right behind the turn's terminator (`<|im_end|>`, `</s>`, ...), which must be learned or
the model never stops; the line break that many templates put behind it is left out, since
generation has stopped by then.
"""

import re
from collections.abc import Sequence
from typing import Protocol

Message = dict[str, str]
Span = tuple[int, int]

# Unassigned for good (private use), and pairs, so that single ones in the data do no harm.
_BEGIN, _END = "\ue0f0\ue0f1", "\ue0f2\ue0f3"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RenderError(Exception):
    """The template refused the messages; the message is the template's own."""


class SpanError(Exception):
    """No way of locating an assistant turn passed its check."""


class Render(Protocol):
    """A chat template: messages in, text out. Raises RenderError."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The rendered text."""
        ...


def has_markers(template: str) -> bool:
    """Whether a template marks the assistant's text with `{% generation %}`."""
    return _MARKER.search(template) is not None


def assistant_spans(
    render: Render, messages: Sequence[Message], full: str, special: Sequence[str]
) -> list[Span]:
    """(start, end) in `full` of every assistant turn, in order, terminator included.

    `full` is `render(messages)`; `special` are the tokenizer's special tokens as text. Raises
    SpanError where a turn cannot be located beyond doubt.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_by_prefix(render, messages, turn, full) for turn in turns]
    if None in spans:
        bare = _by_sentinels(render, messages, full)
        if len(bare) != len(turns):
            raise SpanError("the template changes or drops an assistant message")
        closed = _with_terminators(bare, full, special)
        spans = [span or other for span, other in zip(spans, closed, strict=True)]
    return [_without_tail(span, full, special) for span in spans if span]


def marked_spans(spans: Sequence[Span], full: str, special: Sequence[str]) -> list[Span]:
    """The spans a template marked itself, each with its turn's terminator."""
    closed = _with_terminators(list(spans), full, special)
    return [_without_tail(span, full, special) for span in closed]


def _by_prefix(render: Render, messages: Sequence[Message], turn: int, full: str) -> Span | None:
    try:
        before = render(messages[:turn], add_generation_prompt=True)
        upto = full if turn == len(messages) - 1 else render(messages[: turn + 1])
    except RenderError:
        return None
    if full.startswith(before) and full.startswith(upto) and len(before) < len(upto):
        return len(before), len(upto)
    return None


def _by_sentinels(render: Render, messages: Sequence[Message], full: str) -> list[Span]:
    """Spans of the contents alone; empty where the check fails."""
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    for candidate in (stripped, messages):
        marked = render([_marked(message) for message in candidate])
        if marked.replace(_BEGIN, "").replace(_END, "") == full:
            return _between_sentinels(marked)
    return []


def _marked(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": f"{_BEGIN}{message['content']}{_END}"}


def _between_sentinels(marked: str) -> list[Span]:
    """Where the marked stretches lie once the sentinels are taken out."""
    spans = []
    removed = 0
    for found in re.finditer(f"{_BEGIN}(.*?){_END}", marked, re.DOTALL):
        start = found.start() - removed
        spans.append((start, start + len(found[1])))
        removed += len(_BEGIN) + len(_END)
    return spans


def _with_terminators(spans: list[Span], full: str, special: Sequence[str]) -> list[Span]:
    """Spans that end before a terminator, lengthened by it.

    The terminator is the special token behind the last turn, where no next turn can be meant by it.
    """
    if not spans or not special:
        return spans
    any_special = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    behind = re.compile(rf"\s*({any_special})").match(full, spans[-1][1])
    if behind is None:
        return spans
    terminator = re.compile(rf"\s*{re.escape(behind[1])}")
    closed = []
    for start, end in spans:
        found = terminator.match(full, end)
        ended = full[start:end].rstrip().endswith(tuple(special))
        closed.append((start, found.end() if found and not ended else end))
    return closed


def _without_tail(span: Span, full: str, special: Sequence[str]) -> Span:
    """The span without white space behind its terminator."""
    start, end = span
    text = full[start:end].rstrip()
    return (start, start + len(text)) if text.endswith(tuple(special)) else span
