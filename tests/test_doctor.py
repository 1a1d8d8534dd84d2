import builtins
import importlib.metadata
import subprocess
import sys

import pytest

from qtune import doctor
from qtune_kernels.cpu import tiles


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def lines():
    return {line.name: line for line in doctor.report()}


def test_what_is_here_is_told(tmp_path):
    found = lines()
    assert found["python"].ok and found["torch"].ok and found["transformers"].ok
    assert found["transformers"].value == importlib.metadata.version("transformers")
    assert "threads" in found["cpu"].value and "GiB" in found["memory"].value
    assert str(tmp_path / "cache") in found["cache"].value
    assert any(name.startswith("gpu") for name in found)
    assert ("AMX" in found["cpu kernels"].value) == tiles.available()


def test_what_is_unreachable_is_not_ok():
    found = lines()
    assert not found["hub"].ok and "127.0.0.1:9" in found["hub"].value
    assert not found["package index"].ok and "pip config" in found["package index"].value


def test_missing_packages_are_lines_and_no_errors(monkeypatch):
    real_version, real_import = importlib.metadata.version, builtins.__import__
    absent = ("torch", "triton", "bitsandbytes", "peft")

    def version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    def without(name, *arguments, **options):
        if name.split(".")[0] in absent:
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(builtins, "__import__", without)
    found = lines()
    assert not found["torch"].ok and "install torch" in found["torch"].value
    assert not found["peft"].ok and not found["bitsandbytes"].ok
    assert found["triton"].ok and "only a GPU" in found["triton"].value
    assert "cpu" not in found


def test_old_versions_are_not_ok(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    found = lines()
    assert not found["transformers"].ok and "older than" in found["transformers"].value


def test_versions_compare_by_number(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.100.0.dev1+local.9")
    assert lines()["transformers"].ok


def test_import_and_help_stay_free_of_torch():
    code = "import sys, qtune.doctor; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_show_marks_what_needs_attention(monkeypatch, capsys):
    found = [doctor.Line("torch", "2.13 [cpu]", True), doctor.Line("hub", "unreachable", False)]
    monkeypatch.setattr(doctor, "report", lambda: found)
    doctor.show()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["ok", "torch", "2.13", "[cpu]"],
        ["!!", "hub", "unreachable"],
    ]
