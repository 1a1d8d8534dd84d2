import pytest

from qtune.data.rows import Problems, Row, checked_row
from qtune.errors import UserError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def faults(value):
    problems = Problems()
    assert checked_row("x.jsonl", 3, value, problems) is None
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    lines = str(caught.value).splitlines()
    assert all(line.startswith("x.jsonl:3: ") for line in lines)
    return [line.removeprefix("x.jsonl:3: ") for line in lines]


def test_good_row():
    problems = Problems()
    value = {"messages": [USER, {**ASSISTANT, "name": None, "thinking": "hm"}], "id": 7}
    row = checked_row("x.jsonl", 3, value, problems)
    problems.raise_if_any()
    assert row == Row("x.jsonl", 3, [USER, {**ASSISTANT, "thinking": "hm"}])
    assert row.place == "x.jsonl:3"


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (["a"], "a row must be an object with 'messages', not a list"),
        ({"text": "a", "id": 1}, "no 'messages' in this row (it has 'text', 'id'); write"),
        ({}, "no 'messages' in this row (it has no keys at all)"),
        ({"messages": "hi"}, "'messages' must be a list, not text"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["hi"]}, "message 1 must be an object with 'role' and 'content', not text"),
        ({"messages": [{"content": "a"}, ASSISTANT]}, "message 1 has no 'role'; allowed are"),
        (
            {"messages": [{"role": "human", "content": "a"}, ASSISTANT]},
            "message 1 has the unknown role 'human'; allowed are system, user, assistant, tool "
            "(here: 'user')",
        ),
        (
            {"messages": [{"role": ["user"], "content": "a"}, ASSISTANT]},
            "message 1 has the unknown role ['user']; allowed are",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 needs text as 'content', not no"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            "message 2 needs text as 'content', not a list",
        ),
        ({"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "message 2 has empty 'content'"),
        (
            {"messages": [USER, {**ASSISTANT, "content": "\ud800"}]},
            "message 2 has half a surrogate pair",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]},
            "message 2 has 'tool_calls' with a list; only keys with text are supported",
        ),
        ({"messages": [ASSISTANT, USER]}, "the last message is from the user; only an assistant's"),
    ],
)
def test_faults(value, fault):
    (found,) = faults(value)
    assert found.startswith(fault)


def test_every_fault_of_a_row_is_told():
    found = faults({"messages": [{"role": "x"}, {"role": "user", "content": 5}]})
    assert [line.split(" ")[:2] for line in found] == [["message", n] for n in ("1", "1", "2")]


def test_ten_problems_are_enough():
    problems = Problems()
    for i in range(9):
        problems.add(f"f:{i}", "bad")
    with pytest.raises(UserError) as caught:
        problems.add("f:9", "bad")
    *lines, last = str(caught.value).splitlines()
    assert lines == [f"f:{i}: bad" for i in range(10)]
    assert last == "stopped after 10 problems; there may be more"


def test_no_problem_no_error():
    Problems().raise_if_any()
