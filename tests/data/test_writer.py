import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from qtune.data import writer
from qtune.data.chunk import Hashes, update
from qtune.data.sample import Sample
from qtune.data.writer import Writer
from qtune.errors import UserError


def make(count):
    return [Sample(f"x:{i}", list(range(10)), [0.0] * 3 + [1.0] * 7) for i in range(count)]


@pytest.mark.parametrize(
    ("limit", "value", "sizes"),
    [
        ("BATCH_SAMPLES", 4, [4, 4, 1]),
        ("BATCH_TOKENS", 25, [3, 3, 3]),
        ("BATCH_TOKENS", 1, [1] * 9),
    ],
)
def test_batches_end_after_so_many_samples_or_tokens(limit, value, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, limit, value)
    out = Writer(tmp_path / "x")
    for sample in make(9):
        out.add(sample)
    digest = hashlib.sha256()
    for sample in make(9):
        update(digest, sample)
    assert out.close() == digest.hexdigest()
    file = pa.ipc.open_file(pa.memory_map(str(tmp_path / "x")))
    batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    assert [batch.num_rows for batch in batches] == sizes
    assert [place for batch in batches for place in batch["place"].to_pylist()] == [
        sample.place for sample in make(9)
    ]


def test_hashes_of_a_row_stand_with_its_first_sample(tmp_path):
    out = Writer(tmp_path / "x")
    first, second = make(2)
    out.add(first, Hashes(2**64 - 1, 5))
    out.add(second)
    out.close()
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "x"))).read_all()
    assert table["whole"].to_pylist() == [2**64 - 1, 0] and table["prompt"].to_pylist() == [5, 0]


def test_weights_take_no_room(tmp_path):
    out = Writer(tmp_path / "x")
    for i in range(1000):
        out.add(Sample(f"x:{i}", list(range(300)), [0.0] * 150 + [1.0] * 150))
    out.close()
    # 4 bytes for an id
    assert (tmp_path / "x").stat().st_size < 4.6 * 1000 * 300


def test_a_full_disk_is_told(monkeypatch):
    monkeypatch.setattr(writer, "BATCH_TOKENS", 1000)
    out = Writer(Path("/dev/full"))
    with pytest.raises(UserError, match=r"/dev/full cannot be written .*make room"):
        for sample in make(2000):
            out.add(sample)
