import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from qtune import setup
from qtune.errors import UserError
from qtune.setup import open_setup


def write(path, *pairs):
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_recipe_is_opened(tiny_recipe, tiny_model):
    opened = open_setup(tiny_recipe(), Accelerator())
    assert opened.base == tiny_model and opened.device == torch.device("cpu")
    assert len(opened.data.train) == 12 and len(opened.data.test) == 2
    assert opened.tokenizer.pad_token == "<|endoftext|>"


def test_every_process_needs_a_sample(tiny_recipe):
    two = SimpleNamespace(num_processes=5)
    with pytest.raises(UserError, match=r"train.batch_size \(4\) leaves some of the 5 processes"):
        open_setup(tiny_recipe(), two)


def test_notes_are_few_and_no_markup(tiny_recipe, tmp_path, capsys):
    # rich would take it for the end of something bold
    folder = tmp_path / "[" / "bold]"
    folder.mkdir(parents=True)
    source = write(folder / "a.jsonl", *[("same", "text")] * 9)
    open_setup(tiny_recipe(data={"train": source, "test": None}), Accelerator())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"note: {source}:2: the same as {source}:1"
    assert len(lines) == setup.MOST_WARNINGS + 1 and lines[-1] == "note: and 3 more"


def test_an_expected_answer_must_be_comparable(tiny_recipe, tmp_path):
    test = write(tmp_path / "t.jsonl", ("one", "1"), ("two", "is two"))
    data = {"test": test}
    with pytest.raises(UserError, match=r"t\.jsonl:2: the expected answer is no JSON"):
        open_setup(tiny_recipe(data=data), Accelerator())
    # rows that nobody answers may hold what they like
    open_setup(tiny_recipe(data=data, evaluate={"answer_rows": 1}), Accelerator())
    open_setup(tiny_recipe(data=data, evaluate={"metric": "exact_match"}), Accelerator())
