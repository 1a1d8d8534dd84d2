import pytest

USER = {"role": "user", "content": "2+2="}
ASSISTANT = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("prompt", "completion", "plain"),
    [
        ("2+2=", "4", True),
        ([USER], [ASSISTANT], False),
        ([USER], "4", False),
        ("2+2=", [ASSISTANT], False),
    ],
)
def test_texts_are_plain_and_messages_a_chat(parts, prompt, completion, plain):
    found = parts("auto", {"prompt": prompt, "completion": completion})
    assert found.messages == [USER, ASSISTANT]
    assert found.plain is plain


def test_tools(parts):
    row = {"prompt": [USER], "completion": [ASSISTANT], "tools": [{"name": "add"}]}
    assert parts("auto", row).tools == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("prompt", "completion", "problem"),
    [
        ("", "4", "'prompt' is empty"),
        ("a", 4, "'completion' must be text or a list of messages, not a number"),
        ([ASSISTANT], "4", "the last message of 'prompt' is from the assistant"),
        ("a", [USER], "the last message of 'completion' is from the user"),
        ([{**USER, "role": "gpt"}], "4", "'prompt': message 1 has the unknown role 'gpt'"),
    ],
)
def test_mistakes(fault, prompt, completion, problem):
    assert fault("auto", {"prompt": prompt, "completion": completion}).startswith(problem)
