import pytest


def test_text_is_one_plain_message(parts):
    found = parts("auto", {"text": " Once.\n", "label": 3})
    assert found.messages == [{"role": "assistant", "content": " Once.\n"}]
    assert found.plain


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "'text' is empty; fill it, or leave the row out by where: {text: '!='}"),
        (None, "'text' must be text, not nothing"),
        (["a"], "'text' must be text, not a list"),
    ],
)
def test_mistakes(fault, value, problem):
    assert fault("auto", {"text": value}) == problem
