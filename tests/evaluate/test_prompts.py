import json

import pytest

from qtune.errors import UserError
from qtune.evaluate.prompts import Suite, asked, read_prompts

SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "How far?\n\n  Why? \n"),
        ("a.jsonl", '"How far?"\n{"prompt": "Why?"}\n'),
        ("a.json", '["How far?", {"prompt": "Why?"}]'),
        ("a.yaml", "- How far?\n- prompt: Why?\n"),
    ],
)
def test_prompts_of_each_kind_of_file(tmp_path, name, text):
    rows = read_prompts(written(tmp_path, name, text))
    assert [asked(row) for row in rows] == ["How far?", "Why?"]
    assert rows[0].messages[-1] == {"role": "assistant", "content": ""}


def test_conversations_and_references(tmp_path):
    entry = json.dumps({"messages": SAID, "reference": "Hello."})
    (row,) = read_prompts(written(tmp_path, "a.jsonl", entry))
    assert row.messages == [*SAID, {"role": "assistant", "content": "Hello."}]
    assert asked(row) == "system: Be brief.\n\nuser: Hi"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "messages": []}', r"a\.jsonl:1: needs either 'prompt' or"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}', "unknown key 'answer'; known are prompt"),
        ("a.jsonl", '"a"\n{"prompt": " "}', r"a\.jsonl:2: 'prompt' must be text"),
        ("a.jsonl", '"a"\n{', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"prompt": "a", "reference": 1}', "'reference' must be text"),
        ("a.jsonl", "3", "must be text or an object, not a number"),
        ("a.jsonl", '{"messages": [{"role": "who", "content": "a"}]}', "allowed are system"),
        ("a.yaml", "a: b", "must be a list of prompts"),
        ("a.yaml", "- [", "not valid YAML"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "a", "unknown kind of prompt file"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, name, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file"):
        read_prompts(tmp_path / "a.txt")


def test_answers_stand_beside_earlier_ones(tmp_path):
    rows = read_prompts(written(tmp_path, "a.txt", "One?\nTwo?\n"))
    suite = Suite(rows)
    suite.answers |= {"base": ["1", "2"], "merged onto x": ["3", "4"]}
    suite.rename("merged onto x", "export bf16")
    # the second prompt was another one when the adapter was measured
    earlier = [
        {
            "prompt": "One?",
            "reference": None,
            "answers": {"adapter": "0", "base": "old", "merged onto x": "3"},
        },
        {"prompt": "Three?", "reference": None, "answers": {"adapter": "9"}},
    ]
    assert suite.beside(earlier) == [
        {
            "prompt": "One?",
            "reference": None,
            "answers": {"adapter": "0", "base": "1", "export bf16": "3"},
        },
        {"prompt": "Two?", "reference": None, "answers": {"base": "2", "export bf16": "4"}},
    ]
    assert suite.beside(None)[0]["answers"] == {
        "base": "1",
        "export bf16": "3",
    }
