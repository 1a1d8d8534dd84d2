import json

import pytest

from qtune.data.questions import questions
from qtune.errors import UserError


@pytest.fixture
def asked(tiny_recipe, tokenizers, tmp_path):
    """The questions in a file of rows."""

    def ask(*rows, family="chatml", tokenizer=None, **evaluate):
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = tiny_recipe(data={"test": str(path)}, evaluate=evaluate)
        return questions(recipe, tokenizer or tokenizers[family])

    return ask


def talk(*texts, system=None, **others):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **others}


def test_rows_of_all_sources(tiny_recipe, tokenizers):
    recipe = tiny_recipe(data={"test": ("demo:test?rows=2", "demo:validation?rows=3")})
    rows = questions(recipe, tokenizers["chatml"])
    assert [row.place.split("?")[0] for row in rows] == ["demo:test"] * 2 + ["demo:validation"] * 3


def test_no_test_rows(tiny_recipe, tokenizers):
    assert questions(tiny_recipe(data={"test": None}), tokenizers["chatml"]) == []


def test_rows_of_every_form(asked, make_tokenizer, tokenizers):
    tokenizer = make_tokenizer(
        "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizers["chatml"].chat_template
    )
    call = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = asked(talk("a", "b"), talk("a", "b", tools=[call]), tokenizer=tokenizer)
    assert [row.messages[-1]["content"] for row in rows] == ["b", "b"]
    assert rows[1].tools == [call]
    (plain,) = asked({"prompt": "a", "completion": "b"})
    assert plain.plain and plain.messages[-1]["content"] == "b"


def test_rows_that_cannot_be_asked_are_all_named(asked):
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    calling = {"messages": [*talk("a")["messages"], {"role": "assistant", "tool_calls": call}]}
    answer = {"messages": [{"role": "assistant", "content": "x"}]}
    with pytest.raises(UserError) as error:
        asked(talk("a", "b"), answer, calling)
    first, second = str(error.value).splitlines()
    assert first.endswith("t.jsonl:2: a test row needs a message before the expected answer")
    assert ":3: a test row needs text as the expected answer" in second


def test_what_the_template_refuses_is_named_for_rows_that_are_asked(asked):
    rows = [talk("a", "b"), talk("a", "b", system="s")]
    with pytest.raises(UserError, match=r"t.jsonl:2: .*refuses the messages"):
        asked(*rows, family="gemma")
    assert len(asked(*rows, family="gemma", answer_rows=1)) == 2
