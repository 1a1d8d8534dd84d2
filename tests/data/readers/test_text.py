from qtune.data.readers.text import read
from qtune.data.records import Broken


def test_a_file_is_one_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOnce\r\n\nupon ü".encode())
    assert list(read(path)) == [(1, {"text": "Once\r\n\nupon ü"})]
    assert list(read(path, 1)) == []


def test_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n\xff")
    assert list(read(path)) == [(3, Broken("not UTF-8 (byte 0xff); save the file as UTF-8"))]
