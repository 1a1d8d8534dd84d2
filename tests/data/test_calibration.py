"""Rows of calibration text: which tokens, how many, in what rows."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from qtune.data.calibration import Text, calibration_text
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.recipe import Calibration


def samples(*lengths: int) -> list[Sample]:
    """Samples whose tokens tell which one it is: 100 n, 100 n + 1 ..."""
    return [
        Sample(str(n), range(100 * n, 100 * n + length), [1.0] * length)
        for n, length in enumerate(lengths)
    ]


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) for character in text]}


def text_of(rows: Sequence[Sample] = (), **settings: object) -> Text:
    return calibration_text(Calibration(**settings), rows, Characters())  # type: ignore[arg-type]


def test_rows_hold_whole_samples_of_all_parts_of_the_data() -> None:
    found = text_of(samples(*[10] * 40), tokens=200, length=35)
    assert found.num_tokens == 200
    assert {len(row) for row in found.rows} == {20, 30}
    drawn = [token // 100 for row in found.rows for token in row[::10]]
    assert len(set(drawn)) == 20 and max(drawn) > 30 and drawn != sorted(drawn)
    for row in found.rows:
        assert all(row[at : at + 10] == list(range(row[at], row[at] + 10)) for at in (0, 10))


def test_the_same_rows_each_time_and_another_hash_for_others() -> None:
    rows = samples(*[10] * 40)
    first, again = (text_of(rows, tokens=100, length=16) for _ in range(2))
    assert first.rows == again.rows and first.sha256 == again.sha256
    assert text_of(rows, tokens=90, length=16).sha256 != first.sha256


def test_sample_longer_than_a_row_is_cut() -> None:
    found = text_of(samples(50, 50), tokens=100, length=20)
    assert sorted(row[0] for row in found.rows) == [0, 100]
    assert [len(row) for row in found.rows] == [20, 20]


def test_fewer_tokens_than_wanted_are_all_there_are() -> None:
    assert text_of(samples(5, 5), tokens=1000, length=16).num_tokens == 10


def test_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    found = text_of(text=str(path), tokens=45, length=20)
    assert "".join(chr(token) for row in found.rows for token in row) == ("abcdefghij" * 5)[:45]
    assert [len(row) for row in found.rows] == [20, 20, 5] and found.source == str(path)


def test_half_of_each(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("z" * 1000)
    found = text_of(samples(*[10] * 40), text=f"train + {path}", tokens=100, length=20)
    of_file = sum(token == ord("z") for row in found.rows[-3:] for token in row)
    assert of_file == 50 and found.num_tokens == 100


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quant\.calibration\.text: .*none\.txt cannot be read"):
        text_of(text=f"train + {tmp_path / 'none.txt'}")


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(UserError, match=r"bytes cannot be read as text"):
        text_of(text=str(tmp_path / "bytes"))


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="holds no text"):
        text_of(text=str(tmp_path / "empty"))
