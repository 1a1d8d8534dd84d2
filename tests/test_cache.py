import subprocess
import sys
import threading
import time

import pytest

from qtune import cache as cache_module
from qtune.cache import build_once, cache_folder, need_space, wait_for
from qtune.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))


def test_place_follows_the_variable(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("QTUNE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/qtune"


def test_second_call_builds_nothing():
    place = cache_folder() / "models/x"
    built = []

    def build(folder):
        built.append(folder)
        (folder / "file").write_text("content")

    assert build_once(place, build) == build_once(place, build) == place
    assert len(built) == 1 and built[0] != place
    assert (place / "file").read_text() == "content"


def test_failure_leaves_no_folder():
    place = cache_folder() / "models/x"

    def build(folder):
        (folder / "file").touch()
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        build_once(place, build)
    assert not list(place.parent.glob("**/file"))
    assert not place.exists()


def test_rest_of_a_killed_process_is_cleared():
    place = cache_folder() / "models/x"
    rest = place.with_name(f".{place.name}.partial")
    rest.mkdir(parents=True)
    (rest / "half").touch()
    build_once(place, lambda folder: (folder / "file").touch())
    assert [file.name for file in place.iterdir()] == ["file"]


BUILDER = """
import time
from qtune.cache import build_once, cache_folder

def build(folder):
    print("built")
    (folder / "file").write_text("a")
    time.sleep(0.3)
    (folder / "file").write_text("whole")

print((build_once(cache_folder() / "models/x", build) / "file").read_text())
"""


def test_processes_at_the_same_time_build_once():
    start = [subprocess.Popen([sys.executable, "-c", BUILDER], stdout=-1, text=True) for _ in "abc"]
    lines = [process.communicate(timeout=60)[0].split() for process in start]
    assert sorted(lines) == [["built", "whole"], ["whole"], ["whole"]]


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="QTUNE_CACHE"):
        build_once(cache_folder() / "models/x", lambda folder: None)


def test_space_is_asked_for(tmp_path):
    need_space(tmp_path, 1)
    with pytest.raises(UserError, match="GB free"):
        need_space(tmp_path, 1 << 60)


def test_waiting_ends_when_the_folder_is_there():
    place = cache_folder() / "data/x"

    def build(folder):
        (folder / "file").touch()
        time.sleep(0.3)

    builder = threading.Thread(target=build_once, args=(place, build))
    builder.start()
    assert [path.name for path in wait_for(place).iterdir()] == ["file"]
    builder.join()


def test_waiting_for_what_nobody_builds_ends(monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"no process builds .*data/x: is QTUNE_CACHE the same"):
        wait_for(cache_folder() / "data/x")


def test_who_builds_may_take_longer_than_the_patience(monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.6)
    place = cache_folder() / "data/x"
    builder = threading.Thread(target=build_once, args=(place, lambda _: time.sleep(1.5)))
    builder.start()
    assert wait_for(place) == place
    builder.join()
