"""Which characters of a rendered conversation the assistant wrote: verified, never guessed.

A chat template is a program that may do anything with the messages, so the beginning and the end of
each turn are taken from renderings of changed conversations, and hold only if all else stays where
it was:

- prefix: the conversation before the turn, with the generation prompt, must be a beginning of the
  full rendering; the turn begins behind it, where the model begins at inference. Likewise the
  conversation up to the turn, for its end;
- stand-in: the turn is replaced by private-use characters, and what is rendered before and behind
  them must be the beginning and the end of the full rendering (templates that drop the thoughts of
  earlier turns, or render the last message differently, need this one);
- neighbours: the messages before and behind the turn are replaced in the same way (templates that
  move tools to the last question, or refuse a plain answer in place of a tool call).

A template may also mark what is generated itself. Its marks may narrow a turn that was located, but
they do not widen it.

A turn ends right behind its terminator (`<|im_end|>`, `</s>`, ...), which must be learned or the
model never stops. What some templates put behind that, a line break or an end-of-text token, is
left out: generation has stopped by then.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from qtune.data.rows import Message

Span = tuple[int, int]

# Unassigned for good (private use), and several, so that single ones in the data do no harm.
_STAND_IN = "\ue0f0\ue0f1\ue0f2"


class RenderError(Exception):
    """The template refused the messages; the message is the template's own."""


class SpanError(Exception):
    """No way of locating a message passed its check."""


class Render(Protocol):
    """A chat template: messages in, text out. Raises RenderError."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The rendered text."""
        ...


@dataclass(frozen=True)
class Rendered:
    """Messages with their rendering `text`; `special` are the tokenizer's special tokens."""

    render: Render
    messages: Sequence[Message]
    text: str
    special: Sequence[str]

    def answers(self) -> dict[int, Span]:
        """(start, end) in the text of every assistant turn, by its index, terminator included.

        Raises SpanError where one cannot be located beyond doubt.
        """
        found = {}
        for i in self._turns:
            start, end = self._start(i), self._end(i)
            if start is None or end is None or start >= end:
                raise SpanError(f"the template changes or drops message {i + 1}, an assistant's")
            found[i] = start, end
        return found

    def content(self, index: int) -> Span:
        """(start, end) in the text of what one message contributes. Raises SpanError."""
        start, end = self._replaced(index)
        if start is None or end is None or start > end:
            raise SpanError(f"the template changes or drops message {index + 1}")
        return start, end

    def within(self, marks: Sequence[Span]) -> dict[int, list[Span]]:
        """The parts of each assistant turn that the template marked as generated.

        What is marked outside of the turns (headers, an end-of-text token) is left out. Where the
        turns cannot be located, one mark for each is believed. Raises SpanError where a turn has no
        mark, or a mark holds text of no turn.
        """
        try:
            answers = self.answers()
        except SpanError as error:
            return self._one_each(marks, error)
        found: dict[int, list[Span]] = {turn: [] for turn in answers}
        for start, end in marks:
            touched = [turn for turn, (a, b) in answers.items() if start < b and end > a]
            if not touched and self._is_text(start, end):
                marked = self.text[start:end][:40]
                raise SpanError(f"it marks {marked!r}, which is not the assistant's")
            for turn in touched:
                first, last = answers[turn]
                # a mark that leaves out the terminator ends with the content
                closed = last if self._behind(min(end, last)) == last else min(end, last)
                found[turn].append((max(start, first), closed))
        for turn, parts in found.items():
            if not parts:
                raise SpanError(f"it marks nothing of message {turn + 1}, an assistant's")
        return found

    def _one_each(self, marks: Sequence[Span], error: SpanError) -> dict[int, list[Span]]:
        """The marks with text as the turns. Raises `error` where they are not as many."""
        texts = [(start, end) for start, end in marks if self._is_text(start, end)]
        if len(texts) != len(self._turns):
            raise error
        return {
            turn: [(start, self._behind(end) or start + len(self.text[start:end].rstrip()))]
            for turn, (start, end) in zip(self._turns, texts, strict=True)
        }

    @cached_property
    def _turns(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    @cached_property
    def _terminator(self) -> str | None:
        """The special token behind an answer, None where there is none.

        It is looked for behind the last turn, where no header of a next one can be taken for it.
        """
        last = self._turns[-1]
        halves = self._halves(self.messages[: last + 1], last)
        if halves is None:
            return None
        behind = halves[1].lstrip()
        return max((t for t in self.special if behind.startswith(t)), key=len, default=None)

    def _start(self, turn: int) -> int | None:
        before = self._try(self.messages[:turn], add_generation_prompt=True)
        if before is not None and self.text.startswith(before):
            return len(before)
        start = self._start_behind_previous(turn)
        return self._replaced(turn)[0] if start is None else start

    def _start_behind_previous(self, turn: int) -> int | None:
        """Behind the message before the turn and the generation prompt."""
        if turn == 0:
            return None
        _, end = self._replaced(turn - 1)
        asked = self._halves(self.messages[:turn], turn - 1, add_generation_prompt=True)
        if end is None or asked is None or not self.text.startswith(asked[1], end):
            return None
        return end + len(asked[1])

    def _end(self, turn: int) -> int | None:
        _, content_end = self._replaced(turn)
        end = None if content_end is None else self._behind(content_end)
        if end is None:
            end = self._end_by_prefix(turn)
        if end is None:
            end = self._end_before_next(turn)
        return content_end if end is None else end

    def _behind(self, end: int) -> int | None:
        """The end of the terminator that follows; None where it does not."""
        if self._terminator is None:
            return None
        found = re.compile(rf"\s*{re.escape(self._terminator)}").match(self.text, end)
        return found.end() if found else None

    def _end_by_prefix(self, turn: int) -> int | None:
        """The end of the conversation up to the turn, without space behind a special token."""
        last = turn == len(self.messages) - 1
        upto = self.text if last else self._try(self.messages[: turn + 1])
        if upto is None or not self.text.startswith(upto):
            return None
        bare = upto.rstrip()
        return len(bare) if bare.endswith(tuple(self.special)) else len(upto)

    def _end_before_next(self, turn: int) -> int | None:
        """The end of the last terminator before the content of the next message."""
        if turn == len(self.messages) - 1 or self._terminator is None:
            return None
        start, (following, _) = self._start(turn), self._replaced(turn + 1)
        if start is None or following is None:
            return None
        found = self.text.rfind(self._terminator, start, following)
        return None if found < 0 else found + len(self._terminator)

    def _replaced(self, index: int) -> tuple[int | None, int | None]:
        """Where a message starts and ends, each None where the rest of the text has changed."""
        halves = self._halves(self.messages, index)
        if halves is None:
            return None, None
        head, tail = halves
        start = len(head) if self.text.startswith(head) else None
        return start, len(self.text) - len(tail) if self.text.endswith(tail) else None

    def _halves(
        self, messages: Sequence[Message], index: int, *, add_generation_prompt: bool = False
    ) -> tuple[str, str] | None:
        """The rendering before and behind a message; None where it cannot be replaced."""
        # of an answer only stays that it is one
        kept = messages[index] if messages[index]["role"] != "assistant" else {"role": "assistant"}
        changed = [*messages[:index], kept | {"content": _STAND_IN}, *messages[index + 1 :]]
        text = self._try(changed, add_generation_prompt=add_generation_prompt)
        if text is None or text.count(_STAND_IN) != 1:
            return None
        head, _, tail = text.partition(_STAND_IN)
        return head, tail

    def _try(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str | None:
        """The rendering; None where the template refuses the messages."""
        try:
            return self.render(messages, add_generation_prompt=add_generation_prompt)
        except RenderError:
            return None

    def _is_text(self, start: int, end: int) -> bool:
        """Whether there is more than special tokens and white space."""
        rest = self.text[start:end]
        for token in self.special:
            rest = rest.replace(token, "")
        return bool(rest.strip())
