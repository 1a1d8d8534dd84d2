import json
from pathlib import Path

import pytest

from qtune.data import encoded
from qtune.data import prepare as module
from qtune.data.chat import encode
from qtune.data.feed import StoredFeed
from qtune.data.prepare import prepare
from qtune.data.sources import load
from qtune.data.stream import StreamFeed
from qtune.errors import UserError
from qtune.recipe_data import Source

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def prepared(tiny_recipe, tokenizer):
    """The data of a recipe with these fields of `data`, and others by section."""

    def make(fields, **sections):
        given = {"validation": None, "test": None, **fields}
        return prepare(tiny_recipe(data=given, **sections), tokenizer)

    return make


@pytest.fixture
def file(tmp_path):
    def write(name, *answers, **columns):
        rows = [
            {"messages": [said("user", f"{name} {i}?"), said("assistant", answer)], **columns}
            for i, answer in enumerate(answers)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def said(role, text):
    return {"role": role, "content": text}


def places(samples):
    return [sample.place for sample in samples]


def warnings(data):
    return [str(finding) for finding in data.warnings]


def test_parts_come_from_where_the_recipe_says(prepared, tokenizer, file, tiny_recipe):
    train, validation, test = file("a", "x", "y"), file("b", "z"), file("c", "w")
    data = prepared({"train": train, "validation": validation, "test": test})
    rows = load(train)
    expected = [encode(tokenizer, row, settings=tiny_recipe().data)[0] for row in rows]
    assert list(data.feed.samples) == expected
    assert places(data.held_out) == [f"{validation}:1"] and data.test == load(test)
    assert data.warnings == [] and isinstance(data.feed, StoredFeed)
    assert data.feed.batch(0) and len(data.feed.batch(0)) == 4


@pytest.mark.parametrize(("share", "count"), [(None, 2), (0.25, 10), (0.001, 1)])
def test_a_share_is_set_aside_by_the_seed(prepared, file, share, count):
    train = file("a", *map(str, range(40)))
    fields = {"train": train, "validation": share}
    data, again, other = (prepared(fields, seed=seed) for seed in (0, 0, 1))
    held_out = places(data.held_out)
    assert len(held_out) == count and held_out == places(again.held_out)
    assert held_out != places(other.held_out)
    assert sorted(held_out + places(data.feed.samples)) == sorted(places(load(train)))


def test_a_source_keeps_its_share_when_others_join(prepared, file):
    one, two = file("a", *map(str, range(40))), file("b", *map(str, range(60)))
    alone, both = prepared({"train": one}), prepared({"train": (one, two)})
    assert len(both.held_out) == 2 + 3
    assert places(both.held_out)[:2] == places(alone.held_out)


def test_pieces_of_one_text_stay_together(prepared, tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"{i} " * 30 for i in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {"train": str(path), "validation": 0.3, "max_length": 16, "overlong": "split"}
    data = prepared(fields, train={"objective": "pretrain"})
    held_out, train = set(places(data.held_out)), set(places(data.feed.samples))
    assert len(held_out) == 6 and len(train) == 14 and not held_out & train
    assert data.summary["train"]["rows"] == 14 < data.summary["train"]["samples"]


def test_one_row_cannot_be_divided(prepared, file):
    with pytest.raises(UserError, match="a single row, or answers that are all bad, cannot be"):
        prepared({"train": file("a", "x")})
    # others can be: of this source all is trained on
    data = prepared({"train": (file("a", "x"), file("b", "y", "z"))})
    assert len(data.held_out) == 1 and len(data.feed.samples) == 2


def test_what_is_learned_and_tested_is_noted(prepared, file):
    train = file("a", "x", "y", "y")
    data = prepared({"train": train, "validation": file("b", "x"), "test": train})
    assert warnings(data) == [
        f"{train}:{n}: held out, but also a training row ({train}:{n})" for n in (1, 2, 3)
    ]
    assert data.summary["findings"] == {"held out and trained on": 3}


def test_rows_in_two_sources_are_noted(prepared, file, tmp_path):
    one = file("a", "x", "y")
    two = tmp_path / "b.jsonl"
    two.write_text(Path(one).read_text())
    data = prepared({"train": (one, str(two)), "validation": file("c", "z")})
    assert warnings(data) == [f"{two}:{n}: the same as {one}:{n}" for n in (1, 2)]


def test_findings_of_all_parts_come_together(prepared, file):
    fields = {"max_length": 40, "overlong": "truncate"}
    train, validation = file("a", "x", "y " * 50), file("b", "z " * 50, "w")
    data = prepared({"train": train, "validation": validation, **fields})
    assert data.summary["findings"] == {"cut": 2}
    assert {finding.place for finding in data.warnings} == {f"{train}:2", f"{validation}:1"}


def test_a_change_of_the_mix_encodes_nothing(prepared, file, monkeypatch):
    one, two = file("a", *"uvwxyz"), file("b", *"uvwxyz")
    first = prepared({"train": (one, two)})

    def never(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoded, "encode", never)
    heavy = Source(path=two, weight=3.0)
    second = prepared({"train": (Source(path=one, weight=1.0), heavy), "packing": False})
    assert second.feed.sha256 != first.feed.sha256
    assert [part["share"] for part in second.summary["sources"]] == [0.25, 0.75]
    assert [part["share"] for part in first.summary["sources"]] == [0.5, 0.5]
    prepared({"train": two, "validation": one})


def test_only_the_builder_builds(tiny_recipe, tokenizer, file, monkeypatch):
    recipe = tiny_recipe(data={"train": file("a", "x", "y"), "validation": None, "test": None})
    prepare(recipe, tokenizer)
    monkeypatch.setattr(encoded, "read", None)
    assert len(prepare(recipe, tokenizer, builds=False).feed.samples) == 1


def test_the_summary_can_be_written(prepared, file):
    data = prepared({"train": file("a", "x", "y"), "validation": file("b", "z")})
    found = json.loads(json.dumps(data.summary))
    assert found == data.summary
    assert found["train"]["rows"] == found["train"]["samples"] == 2
    assert found["train"]["tokens"] == sum(len(s.ids) for s in data.feed.samples)
    assert found["held_out"]["rows"] == 1 and found["sources"][0]["rows"] == 2


def test_answers_that_are_bad_are_not_held_out(prepared, tmp_path):
    path, validation = tmp_path / "l.jsonl", tmp_path / "v.jsonl"
    rows = [
        json.dumps({"prompt": f"{i}?", "completion": f"{i}!", "label": i % 2 == 0})
        for i in range(6)
    ]
    path.write_text("\n".join(rows[:3]))
    validation.write_text("\n".join(rows[3:]))
    kto = {"train": {"objective": "kto"}}
    data = prepared({"train": str(path), "validation": str(validation)}, **kto)
    assert [sample.label for sample in data.feed.samples] == [True, False, True]
    assert places(data.held_out) == [f"{validation}:2"]
    validation.write_text(rows[3])
    with pytest.raises(UserError, match="none of the held-out rows has a good answer"):
        prepared({"train": str(path), "validation": str(validation)}, **kto)


def test_only_good_answers_are_set_aside(prepared, tmp_path):
    path = tmp_path / "l.jsonl"
    rows = [{"prompt": f"{i}?", "completion": f"{i}!", "label": i in (3, 7)} for i in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    kto = {"train": {"objective": "kto"}}
    data = prepared({"train": str(path), "validation": 0.5}, **kto)
    assert places(data.held_out) == [f"{path}:4", f"{path}:8"]
    assert len(data.feed.samples) == 18
    path.write_text("\n".join(json.dumps({**row, "label": False}) for row in rows))
    with pytest.raises(UserError, match="answers that are all bad"):
        prepared({"train": str(path)}, **kto)


def test_pairs(prepared, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "good", "rejected": "not so good"} for i in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = prepared({"train": str(path)}, train={"objective": "dpo"})
    assert len(data.feed.samples) == 3 and all(s.rejected for s in data.feed.samples)
    assert data.held_out[0].rejected is not None
    with pytest.raises(UserError, match=r"p.jsonl:1: train.objective: sft needs"):
        prepared({"train": str(path)})


def test_a_stream_is_glimpsed_and_not_stored(prepared, file, monkeypatch):
    monkeypatch.setattr(module, "GLIMPSED_ROWS", 3)
    train, validation = file("a", *"uvwxyz"), file("b", "w", "z")
    fields = {"train": train, "validation": validation, "streaming": True}
    data = prepared(fields)
    assert isinstance(data.feed, StreamFeed) and data.feed.num_rows is None
    assert places(data.feed.samples) == [f"{train}:{n}" for n in (1, 2, 3)]
    assert places(data.held_out) == [f"{validation}:{n}" for n in (1, 2)]
    assert places(data.feed.batch(0)) == [f"{train}:{n}" for n in (1, 2, 3, 4)]
    assert data.summary["train"]["samples"] == 3
