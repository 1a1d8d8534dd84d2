import pytest

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def test_messages_and_tools(parts):
    found = parts("auto", {"messages": [USER, ASSISTANT], "tools": [TOOL], "id": 7})
    assert (found.messages, found.tools) == ([USER, ASSISTANT], [TOOL])
    assert (found.plain, found.rejected, found.label) == (False, None, None)


@pytest.mark.parametrize("tools", [None, "", []])
def test_no_tools(parts, tools):
    assert parts("messages", {"messages": [USER, ASSISTANT], "tools": tools}).tools is None


def test_messages_as_json_text_in_a_cell(parts):
    cell = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]'
    assert parts("auto", {"messages": cell}).messages == [USER, ASSISTANT]


def test_the_last_message_must_be_learned(fault):
    found = fault("messages", {"messages": [ASSISTANT, USER]})
    assert found.startswith("the last message of 'messages' is from the user; only an assistant's")


def test_words_of_sharegpt_are_pointed_out(fault):
    found = fault("auto", {"messages": [{"from": "human", "content": "hi"}]})
    assert "format: sharegpt, columns: {conversations: messages}" in found
