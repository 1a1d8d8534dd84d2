import json

import pytest

ROW = {"instruction": "Add.", "output": "5"}


def contents(found):
    return [(message["role"], message["content"]) for message in found.messages]


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_without_an_input(parts, given):
    found = parts("auto", {**ROW, **given, "text": "### Instruction: Add."})
    assert contents(found) == [("user", "Add."), ("assistant", "5")]
    assert not found.plain


@pytest.mark.parametrize("as_text", [False, True])
def test_input_system_and_history(parts, as_text):
    history = [["1 + 1", "2"], ["2 + 2", "4"]]
    row = {**ROW, "input": "2 + 3", "system": "You add."}
    found = parts("auto", {**row, "history": json.dumps(history) if as_text else history})
    assert contents(found) == [
        ("system", "You add."),
        ("user", "1 + 1"),
        ("assistant", "2"),
        ("user", "2 + 2"),
        ("assistant", "4"),
        ("user", "Add.\n\n2 + 3"),
        ("assistant", "5"),
    ]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"output": ""}, "'output' is empty; fill it, or leave the row out by where: {output: '!="),
        ({"output": None}, "'output' must be text, not nothing"),
        ({"instruction": 3}, "'instruction' must be text, not a number"),
        ({"instruction": "\ud83d"}, "'instruction' has half a surrogate pair"),
        ({"input": ["a"]}, "'input' must be text, not a list"),
        ({"history": {"a": "b"}}, "'history' must be a list of [question, answer], not an object"),
        ({"history": [["a"]]}, "'history': turn 1 must be [question, answer]"),
        ({"history": [["a", "b"], ["a", ""]]}, "'history': turn 2 'answer' is empty"),
        ({"history": "a"}, "'history' is text, but not valid JSON"),
    ],
)
def test_mistakes(fault, given, problem):
    assert fault("auto", {**ROW, **given}).startswith(problem)
