import pytest

from qtune.data.records import Broken, first_not_utf8, not_utf8, opened, opened_text
from qtune.errors import UserError


def test_opened(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    with opened(path) as file:
        assert file.read() == b"\xef\xbb\xbfa\r\nb"
    with opened_text(path) as text:
        assert text.read() == "a\r\nb"


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"), opened(tmp_path):
        pass


def test_the_first_byte_that_is_not_utf8(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("é\n\n".encode() + b"ok \xe9\n\xff")
    assert first_not_utf8(path) == (3, Broken("not UTF-8 (byte 0xe9); save the file as UTF-8"))


def test_not_utf8_names_the_byte():
    with pytest.raises(UnicodeDecodeError) as caught:
        b"a\xff".decode()
    assert not_utf8(caught.value).problem.startswith("not UTF-8 (byte 0xff)")
