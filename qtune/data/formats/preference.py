"""Pairs of answers of which one is preferred: chosen and rejected, with or without what was asked.

The question is in `prompt` (a text that goes to the model as it is, or messages), in `instruction`
and the other columns of alpaca (a chat), or it is the beginning that both answers share: messages,
or text up to the last white space before they part, so that no word is torn.
"""

import re
from itertools import takewhile

from qtune.data.answers import as_messages
from qtune.data.columns import QUESTIONS
from qtune.data.format import Format, Parts, Record
from qtune.data.formats import alpaca
from qtune.data.messages import ending_with_answer, with_system
from qtune.data.rows import Message
from qtune.data.tools import checked_tools
from qtune.data.values import BadRow, kind, text

_NAMES = ("chosen", "rejected")


def _parts(record: Record) -> Parts:
    texts = [isinstance(record[name], str) for name in _NAMES]
    if any(texts) and not all(texts):
        kinds = " and ".join(f"{kind(record[name])} as '{name}'" for name in _NAMES)
        raise BadRow(f"has {kinds}; both must be texts, or both lists of messages")
    chosen, rejected = _pair(record, texts=all(texts))
    _check_difference(chosen, rejected)
    if chosen[0]["role"] == "assistant":
        _refuse_other_questions(record)
    plain = all(texts) and _is_plain(record)
    # A question in the form of alpaca has its system prompt already.
    system = None if "instruction" in record else record.get("system")
    chosen, rejected = (with_system(turns, system, plain=plain) for turns in (chosen, rejected))
    return Parts(chosen, checked_tools(record.get("tools")), plain=plain, rejected=rejected)


def _is_plain(record: Record) -> bool:
    """Whether answers that are texts are no part of a chat."""
    return "instruction" not in record and isinstance(record.get("prompt"), str | None)


def _pair(record: Record, *, texts: bool) -> list[list[Message]]:
    """The conversations with the chosen and the rejected answer."""
    if "instruction" in record:
        asked = alpaca.question(record)
    elif record.get("prompt") is not None:
        asked = as_messages(record["prompt"], "prompt", "user")
    elif texts:
        return _parted(record)
    else:
        asked = []
    return [_conversation(asked, record, name) for name in _NAMES]


def _conversation(asked: list[Message], record: Record, name: str) -> list[Message]:
    """What was asked and one answer, which may repeat what was asked."""
    said = as_messages(record[name], name, "assistant")
    if not _repeats(said, asked):
        if asked and (said[0]["role"] == "system" or said[0]["role"] == asked[-1]["role"]):
            raise BadRow(
                f"'{name}' begins with a message from the {said[0]['role']}, but the prompt, which "
                f"ends with one from the {asked[-1]['role']}, is not in it"
            )
        said = asked + said
    return ending_with_answer(said, name)


def _repeats(said: list[Message], asked: list[Message]) -> bool:
    """Whether an answer begins with what was asked, maybe behind a system prompt."""
    behind_system = said[1:] if said[0]["role"] == "system" else said
    return asked in (said[: len(asked)], behind_system[: len(asked)])


def _parted(record: Record) -> list[list[Message]]:
    """Two texts as messages: the beginning that they share, if any, and what is their own."""
    chosen, rejected = (text(record[name], name) for name in _NAMES)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = "".join(character for character, _ in same)
    # A text that goes on from the other would be left without an answer, white space aside.
    most = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    spaces = [found.start() for found in re.finditer(r"\s+", shared[:most])]
    asked = shared[: spaces[-1]] if spaces else ""
    before = [{"role": "user", "content": asked}] if asked.strip() else []
    start = len(asked) if before else 0
    return [
        [*before, {"role": "assistant", "content": answer[start:]}] for answer in (chosen, rejected)
    ]


def _check_difference(chosen: list[Message], rejected: list[Message]) -> None:
    """Raise BadRow unless the first difference is one between two answers."""
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same; nothing can be learned from them")
    pairs = enumerate(zip(chosen, rejected, strict=False), start=1)
    number, roles = next(((i, {a["role"], b["role"]}) for i, (a, b) in pairs if a != b), (0, set()))
    if not number:
        raise BadRow("one of 'chosen' and 'rejected' is only the beginning of the other")
    if roles != {"assistant"}:
        raise BadRow(
            f"'chosen' and 'rejected' must answer the same, but message {number} differs and is "
            f"from the {' and the '.join(sorted(roles))}"
        )


def _refuse_other_questions(record: Record) -> None:
    """Raise BadRow where answers without a question stand beside one of another name."""
    question = next((name for name in QUESTIONS if record.get(name)), None)
    if question:
        raise BadRow(
            f"has answers without a question, but a column '{question}'; map it with columns: "
            f"{{instruction: {question}}} (chat) or {{prompt: {question}}} (text as it is)"
        )


FORMAT = Format(
    (frozenset(_NAMES),),
    frozenset({"prompt", "tools", "instruction", "input", "system", "history"}),
    _parts,
)
