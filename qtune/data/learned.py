"""What of a row is learned, and how much each part of it counts.

An answer counts its own `weight` (1 where none is given) where `data.train_on` learns it at all. Of
preferences only the answers behind the common beginning are learned, of labelled rows (kto) only
the last answer, which the label is about.
"""

from collections.abc import Callable, Sequence

from qtune.data.rows import Message, Row
from qtune.data.spans import Span
from qtune.data.tokens import Weighted
from qtune.errors import UserError
from qtune.recipe_data import Data


def message_weights(row: Row, messages: Sequence[Message], settings: Data) -> list[float]:
    """What each of the messages, those of the row or its rejected ones, counts; 0: not learned.

    Raises UserError, naming the row, where there is nothing to learn, and for weights on messages
    that are not learned.
    """
    learned = _learned(row, messages, settings)
    weights = []
    for i, message in enumerate(messages):
        weight = float(message.get("weight", 1))
        if "weight" in message and weight and message["role"] != "assistant" and not learned[i]:
            raise UserError(
                f"{row.place}: message {i + 1} ({message['role']}) has a weight, but only the "
                "assistant's are learned; remove it, or set data.train_on: all"
            )
        weights.append(weight if learned[i] else 0.0)
    return weights


def learns_all(row: Row, settings: Data) -> bool:
    """Whether all text of the row is learned, what the template puts around it included."""
    return settings.train_on == "all" and row.rejected is None and row.label is None


def answer_spans(turns: dict[int, list[Span]], weights: Sequence[float]) -> list[Weighted]:
    """The turns' spans, by index of their message, with the weights of the messages, in order."""
    return [
        (start, end, weights[turn])
        for turn, parts in sorted(turns.items())
        for start, end in parts
        if weights[turn]
    ]


def all_spans(length: int, weights: Sequence[float], find: Callable[[int], Span]) -> list[Weighted]:
    """All `length` characters with weight 1, but for messages with weights of their own.

    `find` says where a message lies.
    """
    spans: list[Weighted] = []
    behind = 0
    for i in (i for i, weight in enumerate(weights) if weight != 1):
        start, end = find(i)
        spans += [(behind, start, 1.0), (start, end, weights[i])]
        behind = end
    return [*spans, (behind, length, 1.0)]


def _learned(row: Row, messages: Sequence[Message], settings: Data) -> list[bool]:
    """Per message, whether it is learned."""
    if learns_all(row, settings):
        return [True] * len(messages)
    first = 0 if row.rejected is None else _num_common(row.messages, row.rejected)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if settings.train_on == "last" or row.label is not None:
        answers = answers[-1:]
    if not answers:
        raise UserError(f"{row.place}: {_why_nothing(row)}")
    return [i in answers for i in range(len(messages))]


def _why_nothing(row: Row) -> str:
    if row.rejected is None:
        return "no message is the assistant's, so that there is nothing to learn"
    if row.messages == row.rejected:
        return "the chosen and the rejected answer are the same"
    return "the chosen or the rejected messages have no answer of their own"


def _num_common(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Messages at the beginning that are the same in both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
