import json
import tracemalloc

from qtune.data.readers.json_lines import read
from qtune.data.records import Broken


def write(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_keep_their_numbers(tmp_path):
    # Blank lines, Windows line ends, a byte order mark and a line separator inside a string.
    path = write(tmp_path, '\ufeff{"a": 1}\r\n\n{"a": "x\u2028y"}\n{"a": 3}')
    assert list(read(path)) == [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": 3})]


def test_a_mark_alone_is_no_row(tmp_path):
    assert list(read(write(tmp_path, "\ufeff\n"))) == []


def test_each_mistake_has_its_line_and_column(tmp_path):
    path = write(tmp_path, '{"a": 1}\n{"a": }\n[1, 2\n"é" x\n{"a": 2}\n')
    assert list(read(path)) == [
        (1, {"a": 1}),
        (2, Broken("not valid JSON: Expecting value", 7)),
        (3, Broken("not valid JSON: Expecting ',' delimiter", 6)),
        (4, Broken("not valid JSON: Extra data", 5)),
        (5, {"a": 2}),
    ]


def test_lines_that_are_not_utf8(tmp_path):
    path = write(tmp_path, b'{"a": 1}\n"\xe9"\n3\n"\xff"')
    assert [record for _, record in read(path)] == [
        {"a": 1},
        Broken("not UTF-8 (byte 0xe9); save the file as UTF-8"),
        3,
        Broken("not UTF-8 (byte 0xff); save the file as UTF-8"),
    ]


def test_lines_that_python_refuses(tmp_path):
    path = write(tmp_path, "1" * 5000 + "\n" + "[" * 100_000 + "\n1\n")
    records = [record for _, record in read(path)]
    assert all(record.problem.startswith("not valid JSON: ") for record in records[:2])
    assert records[2] == 1


def test_skipped_records_are_not_parsed(tmp_path):
    path = write(tmp_path, "oops\n\n2\n3\n")
    assert list(read(path, 1)) == [(3, 2), (4, 3)]
    assert list(read(path, 5)) == []


def test_the_size_of_the_file_does_not_matter(tmp_path):
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = write(tmp_path, line * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak_bytes < path.stat().st_size / 20
