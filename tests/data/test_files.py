import json

import pyarrow
import pytest
from pyarrow import parquet

from qtune.data.files import read
from qtune.data.rows import Problems
from qtune.errors import UserError


def rows_of(path):
    problems = Problems()
    rows = list(read(path, problems))
    problems.raise_if_any()
    return rows


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_json_lines_keep_their_line_numbers(write):
    # Blank lines, Windows line ends, a byte order mark and a line separator inside a string.
    path = write("a.jsonl", '\ufeff{"a": 1}\r\n\n{"a": "x\u2028y"}\n{"a": 3}')
    assert rows_of(path) == [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": 3})]


def test_json_lines_name_line_and_column_of_each_mistake(write):
    path = write("a.jsonl", '{"a": 1}\n{"a": }\n[1, 2\n')
    problems = Problems()
    assert list(read(path, problems)) == [(1, {"a": 1})]
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    first, second = str(caught.value).splitlines()
    assert first == f"{path}:2:7: not valid JSON: Expecting value"
    assert second.startswith(f"{path}:3:")


def test_json_list_numbers_rows_by_the_line_they_begin_at(write):
    value = [{"a": [1, {"b": 2}]}, {"a": "x\ny"}, 3]
    path = write("a.json", "\n" + json.dumps(value, indent=1))
    lines = path.read_text().split("\n")
    begins = [n for n, line in enumerate(lines, 1) if line in (" {", " 3")]
    assert rows_of(path) == list(zip(begins, value, strict=True))


@pytest.mark.parametrize("text", ["[]", " [ ] \n", ""])
def test_empty_json_list(write, text):
    assert rows_of(write("a.json", text)) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"messages": []}', "1: must be a list"),
        ('[\n {"a": 1}\n {"a": 2}]', "3:2: not valid JSON: Expecting ',' or ']'"),
        ('[\n {"a": 1},\n {"a": tru}]', "3:8: not valid JSON: Expecting value"),
        ('[{"a": 1},\n]', "1:10: not valid JSON: a comma before the closing bracket"),
        ('[{"a": 1}', "1:10: not valid JSON: Expecting ',' or ']'"),
        ('["a\nb"]', "1:4: not valid JSON: Invalid control character"),
    ],
)
def test_json_list_mistakes(write, text, place):
    path = write("a.json", text)
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}:{place}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_not_utf8(write, name):
    path = write(name, b'[{"a":\n\n"\xe9"}]')
    with pytest.raises(UserError, match=r":3: not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        rows_of(path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    assert rows_of(path) == list(enumerate(rows, start=1))


def test_broken_parquet(write):
    path = write("a.parquet", b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        rows_of(path)


def test_missing_file_suggests_close_names(write):
    path = write("train.jsonl", "")
    write("notes.txt", "")
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl\?"):
        rows_of(path.with_name("trian.jsonl"))
    with pytest.raises(UserError, match=r"no such file, and no folder .*nowhere"):
        rows_of(path.parent / "nowhere" / "train.jsonl")


def test_folder_and_unknown_kind(write, tmp_path):
    write("train.jsonl", "")
    with pytest.raises(UserError, match=r"is a folder; name a file in it: train\.jsonl"):
        rows_of(tmp_path)
    with pytest.raises(UserError, match=r"unknown kind of file; use \.jsonl, \.json, \.parquet"):
        rows_of(write("a.csv", ""))
