"""What templates lose, with templates written as Python functions."""

import json

import pytest

from qtune.data.presented import presented
from qtune.data.spans import RenderError

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"ä": [1]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "1+1?"}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}
ANSWER = {"role": "assistant", "content": "2"}


def everything(tools):
    def render(messages, *, add_generation_prompt=False):
        return json.dumps([tools, messages], ensure_ascii=False)

    return render


def test_messages_stay_as_they_are_but_for_the_weight():
    messages = [SYSTEM, USER, CALLING, RESULT, ANSWER | {"weight": 0.5}]
    assert presented(everything, messages, [TOOL]) == [*messages[:-1], ANSWER]
    assert messages[-1]["weight"] == 0.5


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("system", r"message 1 \(system\)"),
        ("user", r"message 2 \(user\)"),
        ("tool", r"message 4 \(tool\)"),
    ],
)
def test_lost_messages(lost, named):
    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            return everything(tools)([m for m in messages if m["role"] != lost])

        return render

    with pytest.raises(RenderError, match=f"leaves out {named}"):
        presented(template, [SYSTEM, USER, CALLING, RESULT, ANSWER], [TOOL])


def test_lost_tools_even_where_their_name_is_in_the_question():
    def template(tools):
        return everything(None)

    with pytest.raises(RenderError, match="leaves out tool 'add'"):
        presented(template, [{"role": "user", "content": "add!"}, ANSWER], [TOOL])


def test_lost_calls():
    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            return "".join(m.get("content", "") for m in messages)

        return render

    with pytest.raises(RenderError, match=r"the call of 'add' in message 2 \(assistant\)"):
        presented(template, [USER, CALLING, RESULT, ANSWER], None)


@pytest.mark.parametrize("key", ["content", "reasoning_content", "thinking"])
def test_thoughts_may_be_lost_in_all_answers_but_the_last(key):
    thinking = ANSWER | ({key: "<think>\nhm\n</think>2"} if key == "content" else {key: "hm"})

    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            return "".join(m["content"].split("</think>")[-1] for m in messages)

        return render

    assert presented(template, [USER, thinking, USER, ANSWER], None)
    with pytest.raises(RenderError, match="the thoughts of message 2"):
        presented(template, [USER, thinking], None)
    assert presented(everything, [USER, thinking], None) == [USER, thinking]


def test_empty_thoughts_are_none():
    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            return "".join(m["content"].split("</think>")[-1] for m in messages)

        return render

    assert presented(template, [USER, ANSWER | {"content": "<think>\n\n</think>2"}], None)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("with_content", [False, True])
def test_the_form_that_a_template_takes_is_found(as_text, with_content):
    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            for message in messages:
                if with_content and "content" not in message:
                    raise RenderError("no content")
                for call in message.get("tool_calls", ()):
                    if isinstance(call["function"]["arguments"], str) != as_text:
                        raise RenderError("no such arguments")
            return everything(tools)(messages)

        return render

    _, call, *_ = presented(template, [USER, CALLING, RESULT, ANSWER], None)
    arguments = call["tool_calls"][0]["function"]["arguments"]
    assert arguments == ('{"ä": [1]}' if as_text else {"ä": [1]})
    assert call.get("content") == ("" if with_content else None)


def test_the_refusal_told_is_that_of_the_last_form():
    def template(tools):
        def render(messages, *, add_generation_prompt=False):
            raise RenderError("no tools" if "content" in messages[1] else "no content")

        return render

    with pytest.raises(RenderError, match="no tools"):
        presented(template, [USER, CALLING, RESULT, ANSWER], None)
