import csv

import pytest

from qtune.data.readers.delimited import read
from qtune.data.records import Broken
from qtune.errors import UserError

ROWS = [
    {"prompt": "a", "completion": 'b, "c"'},
    {"prompt": "two\nlines\r\nthree\tü😀", "completion": ""},
    {"prompt": "x" * 200_000, "completion": " y "},
]
DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}


def write(tmp_path, content, suffix=".csv"):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("suffix", DIALECTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_the_csv_module_writes(tmp_path, suffix, encoding):
    path = tmp_path / f"a{suffix}"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], dialect=DIALECTS[suffix])
        writer.writeheader()
        writer.writerows(ROWS)
    assert [row for _, row in read(path)] == ROWS
    assert [row for _, row in read(path, 2)] == ROWS[2:]


def test_rows_are_numbered_by_the_line_they_begin_at(tmp_path):
    path = write(tmp_path, 'a,b\n\n1,"x\ny"\n\n2,z\n')
    assert list(read(path)) == [(3, {"a": "1", "b": "x\ny"}), (6, {"a": "2", "b": "z"})]


def test_rows_with_another_number_of_cells(tmp_path):
    found = list(read(write(tmp_path, "a,b\n1\n1,2,3\n1,2\n")))
    assert [number for number, _ in found] == [2, 3, 4]
    assert found[0][1].problem.startswith("has 1 cells, but the first line names 2 columns; put")
    assert found[2][1] == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("text", "line"),
    [('a,b\n1,2\n3,"4\n5,6\n', 3), ('a,b\n1,"2"3\n4,5\n', 2), ('a,"b\n1,2\n', 1)],
)
def test_quotes_that_do_not_match(tmp_path, text, line):
    *_, (number, broken) = read(write(tmp_path, text))
    assert number == line
    assert broken.problem.startswith("the quotes of this row do not match: ")


def test_not_utf8(tmp_path):
    *_, last = read(write(tmp_path, b"a,b\n1,2\n3,\xe9\n"))
    assert last == (3, Broken("not UTF-8 (byte 0xe9); save the file as UTF-8"))


@pytest.mark.parametrize(
    ("text", "suffix", "problem"),
    [
        ("a,b,a\n", ".csv", "the first line names 'a' twice; it must name the columns"),
        ("a,,b\n", ".csv", "the first line has a column without a name; it must name the columns"),
        ("a;b\n1;2\n", ".csv", "the columns are divided by ';', but must be by ',' in a .csv file"),
        ("a,b\n1,2\n", ".tsv", r"the columns are divided by ',', but must be by '\t' in a .tsv"),
    ],
)
def test_headers(tmp_path, text, suffix, problem):
    path = write(tmp_path, text, suffix)
    with pytest.raises(UserError) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:1: {problem}")


@pytest.mark.parametrize("text", ["", "\n", "a,b\n"])
def test_no_rows(tmp_path, text):
    assert list(read(write(tmp_path, text))) == []
