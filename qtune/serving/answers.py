"""A server's answer to a golden prompt against the expected one.

Tokens are compared by their ids where the server tells them, else by the text up to each. What
comes after the first token that differs follows from it and is not looked at.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.export.folder import golden
from qtune.serving.client import Answer
from qtune.serving.difference import length_in_common

_HALVES = re.compile("\ufffd+")
# tokens that a server may go on for, to see that it does not stop
BEYOND = 4


@dataclass(frozen=True)
class Compared:
    """How an answer is the expected one: in words, empty where it is, and in nats.

    `change` is the mean difference of log-probabilities up to the first other token, None where the
    server tells none; `tie` says that rounding decided a token, so that the rest is not compared.
    """

    what: str
    change: float | None
    tie: bool = False


@dataclass(frozen=True)
class Expected:
    """The answer that a golden prompt should get."""

    entry: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]

    @property
    def ended(self) -> bool:
        """Whether a stop token ends it."""
        return self.entry["greedy_ids"][-1] in self.stops

    @property
    def ids(self) -> list[int]:
        """Its tokens without the stop token."""
        ids: list[int] = self.entry["greedy_ids"]
        return ids[:-1] if self.ended else ids

    @property
    def max_tokens(self) -> int:
        """How many tokens a server is asked for."""
        return len(self.entry["greedy_ids"]) + (BEYOND if self.ended else 0)

    @cached_property
    def beginnings(self) -> list[str]:
        """The text up to and with each token."""
        return [self.text(self.ids[: i + 1]) for i in range(len(self.ids))]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as a server shows them."""
        return _plain(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))


def compare(expected: Expected, answer: Answer) -> Compared:
    """How a server's answer is the expected one."""
    if answer.ids is not None and expected.text(answer.ids) != _plain(answer.text):
        # llama.cpp tells none for tokens that are pieces of characters
        known = length_in_common(answer.ids, expected.ids)
        values = answer.log_probabilities and answer.log_probabilities[:known]
        answer = replace(answer, ids=None, log_probabilities=values)
    place = _first(expected, answer)
    change = _change(expected, answer, len(expected.ids) if place is None else place)
    if place is None:
        return Compared(_ending(expected, answer), change)
    if place < len(expected.ids) and _is_tie(expected, answer, place):
        return Compared("", change, tie=True)
    return Compared(_described(expected, answer, place), change)


def _first(expected: Expected, answer: Answer) -> int | None:
    """The index of the first token that is another one or missing; None: there is none."""
    if answer.ids is not None:
        same = length_in_common(answer.ids, expected.ids)
        return None if same == len(expected.ids) else same
    text, whole = _plain(answer.text), "".join(expected.beginnings[-1:])
    if text.startswith(whole):
        return None
    same = length_in_common(text, whole)
    return next(i for i, made in enumerate(expected.beginnings) if len(made) > same)


def _ending(expected: Expected, answer: Answer) -> str:
    """What is wrong with where an answer ends whose tokens are right."""
    if expected.ended and not answer.stopped:
        stop = expected.entry["greedy_ids"][-1]
        name = str(expected.tokenizer.decode([stop]))
        return f"it does not stop at token {len(expected.ids) + 1}, {stop} ({name!r})"
    return ""


def _described(expected: Expected, answer: Answer, place: int) -> str:
    wanted = expected.ids[place]
    was = f"{wanted} ({expected.text([wanted])!r})"
    if answer.ids is not None and place < len(answer.ids):
        now = f"{answer.ids[place]} ({expected.text([answer.ids[place]])!r})"
    else:
        rest = _plain(answer.text)[_length_before(expected, place) :]
        now = f"{rest[:20]!r}" if rest else "the end of the answer"
    return f"token {place + 1} of the answer is {now}, and should be {was}"


def _is_tie(expected: Expected, answer: Answer, place: int) -> bool:
    """Whether rounding may have chosen the token that differs."""
    if answer.ids is not None:
        found = answer.ids[place : place + 1]
    else:
        rest = _plain(answer.text)[_length_before(expected, place) :]
        candidates = expected.entry["top_ids"][place]
        found = [t for t in candidates if (text := expected.text([t])) and rest.startswith(text)]
    return any(golden.is_tie(expected.entry, place, token) for token in found)


def _length_before(expected: Expected, place: int) -> int:
    return len(expected.beginnings[place - 1]) if place else 0


def _plain(text: str) -> str:
    """A text without what servers do differently: space before it, signs for half characters."""
    return _HALVES.sub("\ufffd", text.lstrip())


def _change(expected: Expected, answer: Answer, num: int) -> float | None:
    """Mean difference of log-probabilities, in nats, over the first `num` tokens."""
    if not num or answer.log_probabilities is None:
        return None
    pairs = zip(
        answer.log_probabilities[:num], expected.entry["greedy_logprobs"][:num], strict=False
    )
    moved = [abs(found - wanted) for found, wanted in pairs]
    return sum(moved) / len(moved) if moved else None
