import pytest

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Name a city."}
GOOD = {"role": "assistant", "content": "Rome"}
BAD = {"role": "assistant", "content": "Bread"}


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [GOOD], "rejected": [BAD], "prompt": [USER]},
        {"chosen": [GOOD], "rejected": [BAD], "prompt": USER["content"]},
        {"chosen": "Rome", "rejected": "Bread", "prompt": [USER]},
        {"chosen": "Rome", "rejected": "Bread", "instruction": USER["content"]},
        # As in UltraFeedback: the prompt again, and scores beside it.
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": USER["content"], "score": 3},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": [USER]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": None},
    ],
)
def test_chats(parts, record):
    found = parts("auto", {**record, "id": 7})
    assert found.messages == [USER, GOOD]
    assert found.rejected == [USER, BAD]
    assert not found.plain


def test_system_prompts(parts):
    pair = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    for prompt in (None, [SYSTEM, USER], USER["content"]):
        assert parts("auto", {**pair, "prompt": prompt}).rejected == pair["rejected"]
    # Only the system prompt is common; the question is in each answer.
    answers = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert parts("auto", {**answers, "prompt": [SYSTEM]}).messages == pair["chosen"]
    column = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief."}
    assert parts("auto", column).rejected == pair["rejected"]
    # As in Orca's pairs: all of it text, to be a chat.
    row = {"system": "Be brief.", "question": "Name a city.", "chosen": "Rome", "rejected": "Bread"}
    found = parts("auto", row, columns={"instruction": "question"})
    assert (found.messages, found.rejected) == (pair["chosen"], pair["rejected"])


def test_answers_of_several_messages_and_their_tools(parts):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    result = {"role": "tool", "content": "12:00"}
    row = {"prompt": [USER], "chosen": [call, result, GOOD], "rejected": [BAD]}
    found = parts("auto", {**row, "tools": [{"name": "now"}]})
    assert [message["role"] for message in found.messages] == [
        *("user", "assistant", "tool", "assistant")
    ]
    assert found.tools == [{"type": "function", "function": {"name": "now"}}]


def test_texts_with_a_prompt_are_plain(parts):
    found = parts("auto", {"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    assert found.plain
    assert [message["content"] for message in found.messages] == ["2+2=", "4"]
    assert [message["content"] for message in found.rejected] == ["2+2=", "5"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "asked"),
    [
        (
            "Human: hi\n\nAssistant: I am.",
            "Human: hi\n\nAssistant: I was.",
            "Human: hi\n\nAssistant: I",
        ),
        ("One two", "Two one", None),
        ("a b", "a b c", "a"),
        ("a b c", "a b", "a"),
        ("  x", "  y", None),
        ("same", "sane", None),
    ],
)
def test_texts_without_a_prompt_part_at_white_space(parts, chosen, rejected, asked):
    found = parts("auto", {"chosen": chosen, "rejected": rejected})
    assert found.plain
    for messages, whole in ((found.messages, chosen), (found.rejected, rejected)):
        assert "".join(message["content"] for message in messages) == whole
        assert [m["content"] for m in messages[:-1]] == ([asked] if asked else [])
        assert messages[-1]["content"].strip()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"chosen": "a", "rejected": [BAD]},
            "has text as 'chosen' and a list as 'rejected'; both must be texts, or both lists",
        ),
        ({"chosen": 1, "rejected": 2}, "'chosen' must be text or a list of messages, not a number"),
        ({"chosen": [GOOD], "rejected": [GOOD]}, "'chosen' and 'rejected' are the same"),
        ({"chosen": "a", "rejected": "a", "prompt": "x"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"chosen": [USER], "rejected": [USER]}, "the last message of 'chosen' is from the user"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "?"}, GOOD]},
            "'chosen' and 'rejected' must answer the same, but message 1 differs and is from the u",
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]},
            "'chosen' and 'rejected' must answer the same, but message 1 differs and is from the "
            "system and the user",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            "one of 'chosen' and 'rejected' is only the beginning of the other",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": "Name a town."},
            "'chosen' begins with a message from the user, but the prompt, which ends with one "
            "from the user, is not in it",
        ),
        (
            {"chosen": "a", "rejected": "b", "question": "c"},
            "has answers without a question, but a column 'question'; map it with columns: "
            "{instruction: question} (chat) or {prompt: question} (text as it is)",
        ),
        (
            {"chosen": "a", "rejected": "b", "prompt": "c", "system": "d"},
            "has a system prompt, but plain texts; for a chat, map the question to `instr",
        ),
        ({"chosen": "a", "rejected": "b", "prompt": ""}, "'prompt' is empty"),
        ({"chosen": "a", "rejected": "b", "prompt": 5}, "'prompt' must be text or a list of mess"),
    ],
)
def test_mistakes(fault, record, problem):
    assert fault("auto", record).startswith(problem)
