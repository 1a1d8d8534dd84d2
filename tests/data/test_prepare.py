import json

import pytest

from qtune.data.prepare import prepare
from qtune.errors import UserError
from qtune.recipe import Data


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["chatml"]


@pytest.fixture
def file(tmp_path):
    def write(name, *answers):
        question = {"role": "user", "content": f"{name} asks"}
        rows = [
            {"messages": [question | {"content": f"{name} {i}?"}, said(answer)]}
            for i, answer in enumerate(answers)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def said(text):
    return {"role": "assistant", "content": text}


def test_parts_come_from_where_the_recipe_says(tokenizer, file):
    settings = Data(train=file("a", "x", "y"), validation=file("b", "z"), test=file("c", "w"))
    data = prepare(settings, tokenizer, 0)
    assert [s.row.messages[-1]["content"] for s in data.train] == ["x", "y"]
    assert [s.row.source for s in data.held_out] == [settings.validation]
    assert [row.source for row in data.test] == [settings.test]
    assert data.warnings == []


def test_without_validation_a_part_is_set_aside_by_the_seed(tokenizer, file):
    settings = Data(train=file("a", *map(str, range(40))))
    data, again, other = (prepare(settings, tokenizer, seed) for seed in (0, 0, 1))
    numbers = [s.row.number for s in data.held_out]
    assert len(numbers) == 2 and data.test == []
    assert numbers == [s.row.number for s in again.held_out]
    assert numbers != [s.row.number for s in other.held_out]
    assert not set(numbers) & {s.row.number for s in data.train}


def test_what_is_learned_and_tested_is_noted(tokenizer, file):
    train = file("a", "x", "y", "y")
    data = prepare(Data(train=train, validation=file("b", "x"), test=train), tokenizer, 0)
    assert [str(finding) for finding in data.warnings] == [
        f"{train}:{n}: held out, but also a training row ({train}:{n})" for n in (1, 2, 3)
    ]


def test_rows_that_spoil_a_run_are_named_and_counted(make_tokenizer, file):
    # this template never ends the assistant's turn
    bare = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    train = file("a", *("x" * (i + 1) for i in range(12)))
    with pytest.raises(UserError) as error:
        prepare(Data(train=train, validation=train), bare, 0)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{train}:1: the end of the turn would not be learned")
    assert len(lines) == 11 and lines[-1] == "and 14 more"


def test_a_test_row_without_a_question(tokenizer, file, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [said("x")]}))
    settings = Data(train=file("a", "x", "y"), test=str(tmp_path / "t.jsonl"))
    with pytest.raises(UserError, match=r"t\.jsonl:1: a test row needs a message before"):
        prepare(settings, tokenizer, 0)
