import pytest

from qtune.data.messages import checked_messages, conversation, ending_with_answer, with_system
from qtune.data.values import BadRow

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
RESULT = {"role": "tool", "content": "12:00"}


def call(**more):
    return {"function": {"name": "now", "arguments": {}}, **more}


def calling(*calls):
    return {"role": "assistant", "tool_calls": list(calls)}


def faults(value, name="messages"):
    with pytest.raises(BadRow) as caught:
        conversation(value, name)
    return caught.value.faults


def test_nulls_are_dropped_and_texts_kept():
    message = {**ASSISTANT, "name": None, "reasoning_content": "hm", "weight": 0}
    assert checked_messages([USER, message]) == [
        USER,
        {**ASSISTANT, "reasoning_content": "hm", "weight": 0},
    ]


def test_the_records_own_messages_stay_as_they_are():
    messages = [USER, {**ASSISTANT, "name": None, "tool_calls": []}]
    before = [dict(message) for message in messages]
    assert checked_messages(messages) == [USER, ASSISTANT]
    assert messages == before


def test_content_in_parts():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}]
    assert checked_messages([{"role": "user", "content": parts}])[0]["content"] == "Hello you"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_calls_without_content(content):
    (message,) = checked_messages([{**calling(call()), **content}])
    assert message == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}],
    }


def test_calls_with_content():
    (message,) = checked_messages([{**calling(call()), "content": "Let me see."}])
    assert message["content"] == "Let me see."


def test_tool_messages():
    asked = [USER, calling(call(id="a"), call(id="b"))]
    results = [{**RESULT, "tool_call_id": "b"}, {**RESULT, "tool_call_id": "a"}]
    assert conversation([*asked, *results, ASSISTANT])
    # Calls written as text, as Hermes data has them.
    assert conversation([USER, ASSISTANT, RESULT, ASSISTANT])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hi", "'messages' is text, but not valid JSON"),
        (3, "'messages' must be a list, not a number; write [{"),
        ([], "'messages' is empty; write [{"),
        (["hi"], "message 1 must be an object with 'role' and 'content', not text"),
        ([{"content": "a"}, ASSISTANT], "message 1 has no 'role'; allowed are system, user"),
        (
            [{"role": "human", "content": "a"}, ASSISTANT],
            "message 1 has the unknown role 'human'; allowed are system, user, assistant, tool "
            "(here: 'user')",
        ),
        (
            [{"role": ["user"], "content": "a"}, ASSISTANT],
            "message 1 has the unknown role ['user']; allowed are",
        ),
        ([USER, {"role": "assistant"}], "message 2 needs text as 'content', not nothing"),
        (
            [USER, {**ASSISTANT, "content": [{"type": "image_url"}]}],
            "message 2 has 'content': part 1 is 'image_url'; only {\"type\": \"text\"",
        ),
        ([{**USER, "content": ["a"]}, ASSISTANT], "message 1 has 'content': part 1 is text; only"),
        ([USER, {**ASSISTANT, "content": " \n"}], "message 2 has empty 'content'"),
        ([USER, {**ASSISTANT, "content": []}], "message 2 has empty 'content'"),
        ([USER, {**ASSISTANT, "content": "\ud800"}], "message 2 has half a surrogate pair"),
        ([USER, {**ASSISTANT, "weight": -1}], "message 2 has the weight -1; write a number from 0"),
        ([USER, {**ASSISTANT, "weight": True}], "message 2 has the weight True; write a number"),
        ([USER, {**ASSISTANT, "weight": "1"}], "message 2 has the weight '1'; write a number"),
        ([USER, {**ASSISTANT, "weight": float("nan")}], "message 2 has the weight nan; write a nu"),
        ([USER, {**ASSISTANT, "weight": float("inf")}], "message 2 has the weight inf; write a nu"),
        (
            [USER, {**ASSISTANT, "wieght": 0}],
            "message 2 has 'wieght' with a number; only keys with text are supported; did you mean "
            "'weight'?",
        ),
        ([{**USER, "images": []}, ASSISTANT], "message 1 has 'images' with a list; only keys with"),
        (
            [{**USER, "tool_calls": [call()]}, ASSISTANT],
            "message 1 has tool calls, but is from the user, not the assistant",
        ),
        (
            [USER, calling({"function": {}})],
            "message 2 has 'tool_calls': call 1 has no 'name'; write {",
        ),
        ([USER, calling(call()), USER], "the last message of 'messages' is from the user; only an"),
        ([RESULT, ASSISTANT], "message 1 is from the tool, but is the first; the assistant's call"),
        ([USER, RESULT, ASSISTANT], "message 2 is from the tool, but follows one from the user;"),
        (
            [USER, calling(call(id="a")), {**RESULT, "tool_call_id": "c"}, ASSISTANT],
            "message 3 answers the call 'c', but before it are a",
        ),
    ],
)
def test_faults(messages, fault):
    (found,) = faults(messages)
    assert found.startswith(fault)


def test_every_fault_is_told():
    found = faults([{"role": "x"}, {"role": "user", "content": 5, "weight": -1}])
    assert [line.split(" ")[:2] for line in found] == [["message", n] for n in "1122"]


def test_faults_of_another_column_name_it():
    (found,) = faults([{"role": "user"}], "chosen")
    assert found == "'chosen': message 1 needs text as 'content', not nothing"
    with pytest.raises(BadRow, match="the last message of 'chosen' is from the user"):
        ending_with_answer([USER], "chosen")


SYSTEM = {"role": "system", "content": "Be brief."}


def test_with_system():
    assert with_system([USER], None) == with_system([USER], " ", plain=True) == [USER]
    assert with_system([USER], "Be brief.") == [SYSTEM, USER]
    assert with_system([SYSTEM, USER], "Be brief.") == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("messages", "system", "plain", "fault"),
    [
        ([SYSTEM, USER], "Be long.", False, "has a system message and another one in the column"),
        ([USER], "Be brief.", True, "has a system prompt, but plain texts; for a chat, map the qu"),
        ([USER], 5, False, "'system' must be text, not a number"),
    ],
)
def test_system_prompts_without_a_place(messages, system, plain, fault):
    with pytest.raises(BadRow) as caught:
        with_system(messages, system, plain=plain)
    assert caught.value.faults[0].startswith(fault)
