"""The suite on a CPU: every part runs from end to end, and what fails is recorded."""

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import gpu_suite
import pytest
import torch
from gpu.case import Context

CPU = Context(torch.device("cpu"), quick=True, seed=0)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    torch.use_deterministic_algorithms(False)


def run(part: str, context: Context = CPU) -> list[dict]:
    rows = [case.run() for case in import_module(f"gpu.{part}").cases(context)]
    # what goes into the report must be JSON
    return json.loads(json.dumps(rows, allow_nan=False))


def test_every_op_is_right() -> None:
    rows = run("correctness")
    assert [row for row in rows if not row["ok"]] == []
    assert {row["op"] for row in rows} >= {"dequantize", "linear", "rope", "linear_cross_entropy"}


def test_kernels_agree_with_bitsandbytes() -> None:
    rows = run("kernels")
    assert [row for row in rows if not row["ok"]] == []
    assert {row["goal"] for row in rows} >= {"K1", "K2", "K7", "K8", "K9"}
    assert all(len(it["repeats_us"]) == 2 for row in rows for it in row["variants"].values())


def test_all_ways_to_train_have_the_same_losses() -> None:
    rows = run("steps")
    assert all(row["ok"] for row in rows)
    for key in ("first_loss", "last_loss"):
        losses = [row[key] for row in rows]
        assert max(losses) - min(losses) < 0.01 * min(losses)


def test_the_quickstart_runs(tiny_model: Path) -> None:
    (row,) = run("quickstart", CPU._replace(model=tiny_model))
    assert row["ok"] and row["answers"] == 2


def test_the_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    options = ["--device", "cpu", "--quick", "--only", "quickstart", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [gpu_suite.__file__, *options, "--out", str(out)])
    assert gpu_suite.main() == 0
    report = json.loads(out.read_text())
    assert report["quick"] and report["facts"]["commit"] == "abc"
    (row,) = report["parts"]["quickstart"]["rows"]
    assert row["case"] == "quickstart" and "--model" in row["skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    assert gpu_suite.main() == 2
    assert capsys.readouterr().err.startswith("error: there is no GPU here")
