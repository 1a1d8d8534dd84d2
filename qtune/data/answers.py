"""A prompt and an answer put together to one conversation, whichever way each is written.

Two texts go to the model as they are. As soon as one of them is a list of messages, it is a chat,
and a text beside it is the user's or the assistant's message.
"""

from typing import Any

from qtune.data.messages import checked_messages, ending_with_answer
from qtune.data.rows import Message
from qtune.data.values import BadRow, kind, text


def answered(prompt: Any, answer: Any, name: str) -> tuple[list[Message], bool]:
    """(conversation, whether it is plain text) of the columns 'prompt' and `name`.

    Raises BadRow where they hold neither texts nor messages, or one of the two twice.
    """
    asked = as_messages(prompt, "prompt", "user")
    said = as_messages(answer, name, "assistant")
    if asked[-1]["role"] == "assistant":
        raise BadRow("the last message of 'prompt' is from the assistant; it belongs to the answer")
    plain = isinstance(prompt, str) and isinstance(answer, str)
    return asked + ending_with_answer(said, name), plain


def as_messages(value: Any, name: str, role: str) -> list[Message]:
    """A list of messages as it is, a text as one message of that role. Raises BadRow."""
    if isinstance(value, str):
        return [{"role": role, "content": text(value, name)}]
    if isinstance(value, list):
        return checked_messages(value, name)
    raise BadRow(f"'{name}' must be text or a list of messages, not {kind(value)}")
