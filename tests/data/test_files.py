import datasets
import pytest

from qtune.data.files import READERS, find, missing
from qtune.errors import UserError


@pytest.fixture
def make(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return tmp_path

    return make


def names(path):
    return [file.name for file in find(path)]


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_is_itself(make, suffix):
    path = make(f"a{suffix}") / f"a{suffix}"
    assert find(path) == [path]


def test_missing_file_suggests_close_names(make):
    folder = make("train.jsonl", "notes.txt")
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl\?"):
        find(folder / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file, and no folder .*nowhere"):
        find(folder / "nowhere" / "train.jsonl")
    assert missing(folder / "xyz").endswith(f"xyz: no such file in {folder}")


def test_what_may_be_on_the_hub_is_no_file(make):
    assert find(make() / "org" / "name:train") == []


def test_unknown_kind(make):
    with pytest.raises(UserError, match=r"unknown kind of file; use \.jsonl, \.json, \.csv, \.tsv"):
        find(make("a.xlsx") / "a.xlsx")


def test_patterns(make):
    folder = make("b.jsonl", "a.jsonl", "c.json", "notes.pdf", "deep/d.jsonl")
    assert names(folder / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(folder / "*") == ["a.jsonl", "b.jsonl", "c.json"]
    assert names(folder / "*" / "*.jsonl") == ["d.jsonl"]
    with pytest.raises(UserError, match=r"\*\.csv: no file of data has such a name"):
        find(folder / "*.csv")


def test_relative_patterns(make, monkeypatch):
    monkeypatch.chdir(make("data/a.jsonl"))
    (found,) = find(type(make())("data/*.jsonl"))
    assert str(found) == "data/a.jsonl"


def test_folder_of_files(make):
    folder = make(
        *("b.parquet", "deep/a.parquet", "README.md", "dataset_info.json", "picture.png"),
        *(".cache/x.parquet", "_tmp.parquet"),
    )
    assert names(folder) == ["b.parquet", "a.parquet"]


def test_folders_that_do_not_say_what_is_meant(make):
    folder = make("a/x.json", "a/x.jsonl", "b/x.png", "c/train-0.jsonl", "c/test.jsonl")
    with pytest.raises(
        UserError, match=r"several kinds \(\.json, \.jsonl\); .* as in .*a/\*\.json"
    ):
        find(folder / "a")
    with pytest.raises(UserError, match=r"b: holds no files of data; use \.jsonl"):
        find(folder / "b")
    with pytest.raises(UserError, match=r"c: holds the splits train, test; name one, as in .*c:tr"):
        find(folder / "c")


def test_splits_by_the_names_of_files_and_folders(make):
    folder = make("data/train-00-of-02.parquet", "data/train-01-of-02.parquet", "data/test.parquet")
    assert names(folder / "data:train") == [*("train-00-of-02.parquet", "train-01-of-02.parquet")]
    assert names(folder / "data:test") == ["test.parquet"]
    make("other/train/a.csv", "other/held_out/b.csv")
    assert names(folder / "other:train") == ["a.csv"]
    assert names(folder / "other:out") == ["b.csv"]
    with pytest.raises(UserError, match="no file of a split 'dev'; there are train"):
        find(folder / "other:dev")
    # One split alone needs no name, and a word within a word is none.
    assert names(make("one/train.csv", "one/restrained.csv") / "one") == [
        *("restrained.csv", "train.csv")
    ]


ROWS = [{"text": f"{i}"} for i in range(4)]


def test_saved_data_set(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder), num_shards=2)
    assert [file.suffix for file in find(folder)] == [".arrow", ".arrow"]
    find(folder)[0].unlink()
    with pytest.raises(
        UserError, match=r"saved: lacks data-00000-of-00002\.arrow, which its state"
    ):
        find(folder)


def test_saved_splits(tmp_path):
    folder = tmp_path / "saved"
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    assert {file.parent.name for file in find(tmp_path / "saved:test")} == {"test"}
    with pytest.raises(
        UserError, match=r"saved: holds several splits; name one of train, test, as"
    ):
        find(folder)
    with pytest.raises(
        UserError, match=r"saved: has no split 'dev'; name one of train, test, as in"
    ):
        find(tmp_path / "saved:dev")
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert {file.parent.name for file in find(folder)} == {"test"}


def test_damaged_description_of_a_saved_data_set(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: cannot be read as JSON"):
        find(tmp_path)
