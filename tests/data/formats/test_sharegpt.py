import json

import pytest

CALL = {"name": "weather", "arguments": {"city": "Rome"}}


def turns(*pairs):
    return [{"from": who, "value": value} for who, value in pairs]


def test_conversation_with_a_system_column(parts):
    said = turns(("human", "hi"), ("gpt", "yo"))
    found = parts("auto", {"conversations": said, "system": "Be brief."})
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    assert len(parts("auto", {"conversations": said, "system": " "}).messages) == 2


@pytest.mark.parametrize("value", [json.dumps(CALL), json.dumps([CALL]), CALL, [CALL]])
def test_calls_and_their_results(parts, value):
    said = turns(
        ("human", "Warm?"), ("function_call", value), ("observation", "21 C"), ("gpt", "Yes.")
    )
    messages = parts("auto", {"conversations": said, "tools": json.dumps([{"name": "weather"}])})
    assert messages.tools == [{"type": "function", "function": {"name": "weather"}}]
    assert messages.messages[1:3] == [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "21 C"},
    ]


def test_weight_and_other_keys_stay(parts):
    said = [*turns(("human", "hi")), {"from": "gpt", "value": "yo", "weight": 0.5, "lang": "en"}]
    assert parts("auto", {"conversations": said}).messages[1] == {
        "role": "assistant",
        "content": "yo",
        "weight": 0.5,
        "lang": "en",
    }


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (5, "'conversations' must be a list of messages, not a number"),
        ([], "'conversations' must be a list of messages; this one is empty"),
        (["hi"], "message 1 must be an object with 'from' and 'value', not text"),
        ([{"value": "hi"}], "message 1 has 'from' with None; allowed are human, user, gpt"),
        ([{"from": "bot", "value": "hi"}], "message 1 has 'from' with 'bot'; allowed are human"),
        ([{"from": ["gpt"], "value": "hi"}], "message 1 has 'from' with ['gpt']; allowed are"),
        ([{"from": "gpt"}], "message 1 needs text as 'content', not nothing"),
        (turns(("human", "hi")), "the last message of 'conversations' is from the user"),
        (turns(("function_call", "now()")), "message 1 'value' is text, but not valid JSON"),
        (turns(("observation", "x"), ("gpt", "y")), "message 1 is from the tool, but is the first"),
        (
            [{"role": "user", "content": "hi"}],
            "message 1 has a 'role'; take format: messages, columns: {messages: conversations}",
        ),
    ],
)
def test_mistakes(fault, value, problem):
    assert fault("auto", {"conversations": value}).startswith(problem)
