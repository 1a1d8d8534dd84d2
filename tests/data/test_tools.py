"""The form is compared with what transformers makes of a function."""

import json

import pytest
from transformers.utils import get_json_schema

from qtune.data.tools import checked_calls, checked_tools
from qtune.data.values import BadRow


def weather(city: str) -> str:
    """
    The weather.

    Args:
        city: Where.
    """
    return city


SCHEMA = get_json_schema(weather)
FUNCTION = SCHEMA["function"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize(
    "tools",
    [
        [SCHEMA],
        [FUNCTION],
        json.dumps([SCHEMA]),
        [json.dumps(FUNCTION)],
        [{"type": "function", **FUNCTION}],
        [{**SCHEMA, "function": {**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}}],
    ],
)
def test_tools_get_the_form_of_transformers(tools):
    assert checked_tools(tools) == [SCHEMA]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]"])
def test_no_tools(tools):
    assert checked_tools(tools) is None


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [CALL["function"]],
        [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        json.dumps([CALL]),
        [json.dumps(CALL)],
        [{**CALL, "id": None, "index": 0}],
    ],
)
def test_calls_get_one_form(calls):
    assert checked_calls(calls) == [CALL]


def test_ids_stay_and_arguments_may_be_absent():
    given = [{"id": "a", "function": {"name": "now"}}, {"name": "now", "arguments": ""}]
    empty = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert checked_calls(given) == [{"id": "a", **empty}, empty]


@pytest.mark.parametrize(
    ("tools", "fault"),
    [
        ("now", "'tools' is text, but not valid JSON"),
        ({"name": "now"}, "'tools' must be a list, not an object; write [{"),
        ([3], "tool 1 must be an object, not a number; write {"),
        ([SCHEMA, {"description": "x"}], "tool 2 has no 'name'; write {"),
        ([{"type": "retrieval"}], "tool 1 has the type 'retrieval'; only 'function' is known"),
        ([{"name": "x", "parameters": []}], "tool 1 needs an object as 'parameters', not a list"),
        ([{"name": "x", "parameters": "x"}], "tool 1 'parameters' is text, but not valid JSON"),
    ],
)
def test_bad_tools(tools, fault):
    with pytest.raises(BadRow) as caught:
        checked_tools(tools)
    assert caught.value.faults[0].startswith(fault)


@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        ("now()", "has a call: 'tool_calls' is text, but not valid JSON"),
        ({"name": "now"}, "has 'tool_calls' with an object; write a list of {"),
        ([CALL, {"arguments": {}}], "has 'tool_calls': call 2 has no 'name'; write {"),
        ([{"name": 5}], "has 'tool_calls': call 1 has no 'name'; write {"),
        ([{**CALL, "id": 5}], "has 'tool_calls': call 1 needs text as 'id', not a number"),
        ([{"name": " "}], "has 'tool_calls': call 1 has no 'name'; write {"),
        (
            [{"name": "now", "arguments": "[1]"}],
            "has 'tool_calls': call 1 needs an object as 'arguments', not a list",
        ),
        (
            [{"name": "now", "arguments": "{"}],
            "has 'tool_calls': call 1 'arguments' is text, but not valid JSON",
        ),
    ],
)
def test_bad_calls(calls, fault):
    with pytest.raises(BadRow) as caught:
        checked_calls(calls)
    assert caught.value.faults[0].startswith(fault)
