import datasets
import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from qtune.data.readers.arrow import cells_without_nulls, read_arrow, read_parquet
from qtune.data.records import Broken
from qtune.errors import UserError

ROWS = [{"messages": [{"role": "user", "content": f"{i}"}], "id": i} for i in range(1000)]
TABLE = pyarrow.Table.from_pylist(ROWS)


def write_parquet(path, table=TABLE):
    parquet.write_table(table, path, row_group_size=300)
    return read_parquet


def write_stream(path, table=TABLE):
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return read_arrow


def write_file(path, table=TABLE):
    feather.write_feather(table, str(path), chunksize=300, compression="uncompressed")
    return read_arrow


WRITERS = [write_parquet, write_stream, write_file]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("skip", [0, 1, 299, 300, 650, 999, 1000, 5000])
def test_rows_behind_those_skipped(tmp_path, write, skip):
    path = tmp_path / "a"
    assert list(write(path)(path, skip)) == list(enumerate(ROWS, start=1))[skip:]


def test_skipped_groups_of_a_parquet_file_are_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[4:start] = bytes(start - 4)
    path.write_bytes(content)
    assert [value for _, value in read_parquet(path, 300)] == ROWS[300:]


@pytest.mark.parametrize("write", WRITERS)
def test_a_text_that_is_not_utf8_has_its_row(tmp_path, write):
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xe9b"))
    path = tmp_path / "a"
    read = write(path, pyarrow.table({"text": texts}))
    assert list(read(path)) == [
        (1, {"text": "a"}),
        (2, Broken("not UTF-8 (byte 0xe9); save the file as UTF-8")),
        (3, {"text": "b"}),
    ]


@pytest.mark.parametrize("read", [read_parquet, read_arrow])
@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else"])
def test_other_files(tmp_path, read, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a: not a readable (Parquet|Arrow) file: "):
        list(read(path))


def test_a_file_that_is_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.arrow"
    write_stream(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *rows, (number, broken) = read_arrow(path)
    assert [value for _, value in rows] == ROWS[: len(rows)]
    assert len(rows) >= 300
    assert number == len(rows) + 1
    assert broken.problem.startswith("the file is damaged from here on: ")


def test_keys_of_other_rows_are_not_there(tmp_path):
    """A table has all keys in all objects: each tool would have the parameters of the others."""
    tools = [
        [{"name": "a", "parameters": {"x": 1}}],
        [{"name": "b", "parameters": {"y": [{"z": 0}]}}],
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"tools": each} for each in tools]), path)
    assert parquet.read_table(path).to_pylist()[0]["tools"][0]["parameters"] == {"x": 1, "y": None}
    assert [value["tools"] for _, value in read_parquet(path)] == tools


def test_the_size_of_a_parquet_file_does_not_matter(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i:05}" * 800 for i in range(5000)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    before = pyarrow.total_allocated_bytes()
    peak_bytes = max(pyarrow.total_allocated_bytes() - before for _ in read_parquet(path))
    assert path.stat().st_size > 20_000_000
    assert peak_bytes < 10_000_000


def test_cells_without_nulls_keeps_the_columns():
    assert cells_without_nulls({"a": None, "b": [{"c": None, "d": 0}]}) == {
        "a": None,
        "b": [{"d": 0}],
    }


def test_files_that_datasets_wrote(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    shards = sorted((tmp_path / "saved").glob("*.arrow"))
    assert [value for shard in shards for _, value in read_arrow(shard)] == ROWS
