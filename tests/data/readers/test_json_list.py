import json
import tracemalloc

import pytest

from qtune.data.readers import json_list
from qtune.data.readers.json_list import read
from qtune.data.records import Broken


@pytest.fixture(params=[1, 7, json_list.WINDOW], ids=lambda size: f"window_{size}")
def window(request, monkeypatch):
    """However the file is cut into windows, the result is the same."""
    monkeypatch.setattr(json_list, "WINDOW", request.param)


def write(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


VALUES = [{"a": [1, {"b": 2}]}, {"a": 'x\ny \\" ü😀'}, 3, 1234567890, -1.5e300, "", None, [[]]]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_items_are_those_of_the_library(tmp_path, options):
    path = write(tmp_path, "\ufeff" + json.dumps(VALUES, **options))
    assert [value for _, value in read(path)] == VALUES


@pytest.mark.usefixtures("window")
def test_items_are_numbered_by_the_line_they_begin_at(tmp_path):
    path = write(tmp_path, "\n" + json.dumps(VALUES, indent=1))
    lines = path.read_text("utf-8").split("\n")
    begins = [n for n, line in enumerate(lines, 1) if line[:1] == " " and line[1:2] not in " ]}"]
    assert [number for number, _ in read(path)] == begins
    assert list(read(path, 3)) == list(zip(begins, VALUES, strict=True))[3:]


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "", "\n"])
def test_empty(tmp_path, text):
    assert list(read(write(tmp_path, text))) == []


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('{"messages": []}', (1, None), "must be a list of rows; one object per line goes in .jso"),
        ('[\n {"a": 1}\n {"a": 2}]', (3, 2), "not valid JSON: Expecting ',' or ']'"),
        ('[\n {"a": 1},\n {"a": tru}]', (3, 8), "not valid JSON: Expecting value"),
        ('[{"a": 1},\n]', (1, 10), "not valid JSON: a comma before the closing bracket"),
        ('[{"a": 1}', (1, 10), "not valid JSON: Expecting ',' or ']'"),
        ('["a\nb"]', (1, 4), "not valid JSON: Invalid control character at"),
        ("[1]\n\n  [2]", (3, 3), "not valid JSON: text behind the end of the list"),
        ("[1, " + "2" * 5000 + "]", (1, 5), "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, (1, 2), "not valid JSON: "),
        ("[1, ", (1, 5), "not valid JSON: Expecting value"),
    ],
)
def test_mistakes(tmp_path, text, place, problem):
    *_, (line, broken) = read(write(tmp_path, text))
    assert (line, broken.column) == place
    assert broken.problem.startswith(problem)


def test_what_lies_before_a_mistake_is_there(tmp_path):
    found = list(read(write(tmp_path, '[{"a": 1},\n{"a": 2},\n{]')))
    assert found[:2] == [(1, {"a": 1}), (2, {"a": 2})]
    assert found[2][0] == 3


@pytest.mark.usefixtures("window")
def test_not_utf8(tmp_path):
    *_, last = read(write(tmp_path, b'[{"a":\n\n"\xe9"}]'))
    assert last == (3, Broken("not UTF-8 (byte 0xe9); save the file as UTF-8"))


def test_a_mistake_does_not_read_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "WINDOW", 1000)
    monkeypatch.setattr(json_list, "LONGEST_ITEM", 10_000)
    path = write(tmp_path, "[{]" + " " * 3_000_000)
    tracemalloc.start()
    ((_, broken),) = read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert broken.column == 3
    assert peak_bytes < 1_000_000


def test_the_size_of_the_file_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "WINDOW", 1 << 14)
    path = write(tmp_path, json.dumps([{"text": "x" * 1000}] * 5000))
    tracemalloc.start()
    count = sum(1 for _ in read(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak_bytes < path.stat().st_size / 10
