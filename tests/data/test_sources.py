import csv
import dataclasses
import json
import shutil

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from qtune.data import demo
from qtune.data.rows import Row
from qtune.data.sources import Position, fingerprint, load, read
from qtune.errors import UserError
from qtune.recipe_data import Source


def conversation(text):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    return {"messages": turns}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def told(source):
    with pytest.raises(UserError) as caught:
        load(source)
    return str(caught.value).splitlines()


def test_demo():
    rows = load("demo:test?rows=3")
    assert [row.messages for row in rows] == [r["messages"] for r in demo.rows("test", 3)]
    assert [row.place for row in rows] == [f"demo:test?rows=3:{n}" for n in (1, 2, 3)]
    other = load("demo:test?rows=3&seed=1")
    assert [row.messages for row in other] == [r["messages"] for r in demo.rows("test", 3, seed=1)]
    assert len(load("demo:validation")) == 200


def test_local_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n".join(json.dumps(conversation(text)) for text in ("a", "b")))
    assert load(str(path)) == [
        Row(str(path), 1, conversation("a")["messages"]),
        Row(str(path), 3, conversation("b")["messages"]),
    ]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.jsonl", [conversation("a")])
    assert len(load("~/a.jsonl")) == 1


RECORDS = [{"question": f'2 + {i}, "ü"\n', "answer": f"{2 + i}", "score": i} for i in range(7)]


def as_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


FILES = {
    "a.jsonl": lambda path: write_lines(path, RECORDS),
    "a.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2), "utf-8"),
    "a.csv": as_csv,
    "a.tsv": lambda path: as_csv(path, "\t"),
    "a.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(str(path), num_shards=2),
}


@pytest.mark.parametrize("name", FILES)
def test_all_kinds_of_files_give_the_same_rows(tmp_path, name):
    FILES[name](tmp_path / name)
    source = Source(
        path=str(tmp_path / name),
        columns={"instruction": "question", "output": "answer"},
        where={"score": ">= 2"},
        rows=3,
    )
    assert [row.messages for row in read(source)] == [
        [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        for record in RECORDS[2:5]
    ]


def test_a_folder_of_texts(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.txt").rename(tmp_path / "b.md")
    rows = load(str(tmp_path))
    assert [row.messages[0]["content"] for row in rows] == ["a.md", "b.txt"]
    assert [row.place for row in rows] == [f"{tmp_path}/a.md:1", f"{tmp_path}/b.md:1"]
    assert all(row.plain for row in rows)


def test_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []

    def load_dataset(name, config, **options):
        asked.append(options)
        rows = datasets.Dataset.from_list([conversation(str(i)) for i in range(3)])
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load(Source(path="org/name", revision="v1"))
    assert [row.place for row in rows] == ["org/name:1", "org/name:2", "org/name:3"]
    assert rows[2].messages == conversation("2")["messages"]
    assert list(read(Source(path="org/name"), streaming=True)) == rows
    assert [options["streaming"] for options in asked] == [False, True]


@pytest.mark.parametrize("source", ["train.jsonl", "data/train.jsonl", "./org/name", "train"])
def test_missing_file_never_asks_the_hub(source, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "must not be used")
    with pytest.raises(UserError, match="no such file"):
        load(source)


def test_a_revision_of_a_local_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [conversation("a")])
    with pytest.raises(UserError, match="revision is for data sets of the hub"):
        read(Source(path=path, revision="v1"))


def test_mistakes_of_syntax_and_content_come_in_file_order(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"messages": 3}\n{"messages": }\n{"messages": []}\n"\xff"\n{"a": 1}\n5\n')
    places = [line.removeprefix(str(path)).split(" ")[0] for line in told(str(path))]
    assert places == [":1:", ":2:14:", ":3:", ":4:", ":5:", ":6:"]


def test_no_more_than_ten_mistakes(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": i} for i in [*range(50)]])
    assert told(path) == [
        f"{path}:1: 'messages' must be a list, not a number; write "
        '[{"role": "user", "content": "..."}, {"role": "assistant", ...}] '
        f"(and 9 more, up to {path}:10)",
        "stopped after 10 problems; there may be more",
    ]


def test_mistakes_of_several_files_are_told_together(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, [conversation("x"), {"messages": name}])
    lines = told(f"{tmp_path}/*.jsonl")
    assert [line.split(" ")[0] for line in lines] == [f"{tmp_path}/a.jsonl:2:"]
    assert lines[0].endswith(f"(and 1 more, up to {tmp_path}/b.jsonl:2)")


def test_the_first_rows_are_enough(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [conversation("a"), conversation("b"), {"x": 1}])
    assert len(load(Source(path=path, rows=2))) == 2
    assert "fits no format" in told(Source(path=path, rows=3))[0]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv"])
def test_empty_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("\n")
    assert told(str(path)) == [f"{path}: holds no rows"]


def test_nothing_that_where_takes(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**conversation("a"), "lang": "en"}])
    assert told(Source(path=path, where={"lang": "de"})) == [
        f"{path}: holds no rows that `where` takes"
    ]
    assert told(Source(path=path, where={"lnag": "en"})) == [
        f"{path}: no row has a column 'lnag', which the source names in columns or where"
    ]


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [conversation("a"), *[{"x": 1}] * 10])
    rows = read(Source(path=path))
    assert next(rows).number == 1
    with pytest.raises(UserError, match="fits no format"):
        next(rows)


class Noted:
    def __init__(self):
        self.places = []

    def add(self, place, text):
        self.places.append(place)


def test_mistakes_may_go_elsewhere(tmp_path):
    lines = [conversation("a"), *[{"x": 1}] * 20, conversation("b")]
    path = write_lines(tmp_path / "a.jsonl", lines)
    noted = Noted()
    rows = list(read(Source(path=path), mistakes=noted))
    assert [row.number for row in rows] == [1, 22]
    assert noted.places == [f"{path}:{n}" for n in range(2, 22)]


def many_files(folder):
    """Blank and bad lines, several records on a line, and a file without a row that is taken."""
    rows = [{**conversation(str(i)), "score": i % 3} for i in range(20)]
    lines = ["", *(json.dumps(row) for row in rows[:8]), "oops"]
    (folder / "a.jsonl").write_text("\n\n".join(lines))
    write_lines(folder / "b.jsonl", [{**rows[0], "score": 1}] * 3)
    write_lines(folder / "c.jsonl", rows[8:])
    (folder / "d.json").write_text(json.dumps(rows[:5]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "e.parquet", row_group_size=4)
    return Source(path=f"{folder}/*", where={"score": "!= 1"}, rows=25)


def test_reading_goes_on_at_any_position(tmp_path):
    source = many_files(tmp_path)
    rows = read(source, mistakes=Noted())
    whole, positions = [], [rows.position]
    for row in rows:
        whole.append(row)
        positions.append(rows.position)
    assert len(whole) == 25
    assert {Position(**dataclasses.asdict(position)).file for position in positions} == {0, 2, 3, 4}
    for given, position in enumerate(positions):
        rest = read(source, mistakes=Noted(), position=position)
        assert list(rest) == whole[given:]
        assert rest.position == positions[-1]


def options(path):
    return {
        "format": Source(path=path, format="text"),
        "columns": Source(path=path, columns={"text": "a"}),
        "where": Source(path=path, where={"a": (1, "b")}),
        "rows": Source(path=path, rows=3),
    }


def test_fingerprint_of_options(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [conversation("a")])
    plain = fingerprint(Source(path=path))
    assert plain == fingerprint(Source(path=path))
    assert len({plain, *(fingerprint(source) for source in options(path).values())}) == 5
    # How much of a source is in the mix decides nothing about its rows.
    assert plain == fingerprint(Source(path=path, weight=3))


def test_fingerprint_of_contents(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [conversation("a")])
    before = fingerprint(Source(path=str(folder)))
    assert before == fingerprint(Source(path=str(folder)))
    write_lines(folder / "a.jsonl", [conversation("b")])
    changed = fingerprint(Source(path=str(folder)))
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")
    assert len({before, changed, fingerprint(Source(path=str(folder)))}) == 3


def test_fingerprint_of_the_demo_and_the_hub(monkeypatch):
    assert fingerprint(Source(path="demo:train")) != fingerprint(Source(path="demo:test"))
    monkeypatch.setattr("qtune.data.hub.HubData.fingerprint", lambda self: f"{self.revision} abc")
    first, second = (fingerprint(Source(path="org/name", revision=r)) for r in ("a", "b"))
    assert first != second


def test_fingerprint_of_nothing():
    with pytest.raises(UserError, match="no such file"):
        fingerprint(Source(path="nowhere.jsonl"))
