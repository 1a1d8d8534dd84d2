import pytest

from qtune.data.answers import answered, as_messages
from qtune.data.values import BadRow

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


def test_answered():
    assert answered("a", "b", "completion") == ([USER, ASSISTANT], True)
    assert answered("a", [ASSISTANT], "completion") == ([USER, ASSISTANT], False)
    assert answered([USER], "b", "completion") == ([USER, ASSISTANT], False)


def test_the_prompt_must_leave_the_answer_to_the_other():
    with pytest.raises(BadRow, match="is from the assistant; it belongs to the answer"):
        answered([USER, ASSISTANT], "b", "completion")
    with pytest.raises(BadRow, match="the last message of 'completion' is from the user"):
        answered([USER], [ASSISTANT, USER], "completion")


def test_as_messages():
    assert as_messages("a", "prompt", "user") == [USER]
    assert as_messages([ASSISTANT], "prompt", "user") == [ASSISTANT]
    with pytest.raises(BadRow, match="'prompt' must be text or a list of messages, not an object"):
        as_messages({"role": "user"}, "prompt", "user")
