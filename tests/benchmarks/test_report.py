"""benchmarks/README.md: it is current, and it shows what the results hold and nothing else."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIDES = {"qtune": 10.0, "bitsandbytes": 15.0, "unsloth's calls": 11.0, "qtune nf4": 20.0}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("report")


def product(kind: str, goal: str | None, rows: int, *, theirs: float = 15.0) -> dict[str, Any]:
    times = {"qtune": 10.0, "bitsandbytes": theirs}
    variants = {name: {"median_us": us, "spread": 0.01} for name, us in times.items()}
    shape = {"out": 4096, "in": 4096, "rows": rows, "speedup": theirs / 10}
    return {"case": "", "goal": goal, "kind": kind, "ok": True, **shape, "variants": variants}


def step(variant: str, recompute: str, tokens_per_s: float) -> dict[str, Any]:
    figures = {"tokens_per_s": tokens_per_s, "peak_bytes": 2**30, "first_loss": 2, "last_loss": 1}
    times = {"median": 5.0, "q1": 4.0, "q3": 6.0}
    return {"variant": variant, "recompute": recompute, "ok": True, "step_ms": times, **figures}


def suite(**changes: Any) -> dict[str, Any]:
    kernels = [
        product("forward", "K3", 2),
        product("forward", "K3", 16, theirs=60.0),
        product("backward", "K4", 64),
        {**product("forward", "K2", 1), "ok": False},
    ]
    parts = {
        "correctness": [{"case": "a", "ok": True}, {"case": "b", "ok": False}],
        "kernels": kernels,
        "steps": [step("qtune", "all", 1200.0), step("unsloth's calls", "all", 1000.0)],
        "quickstart": [{"case": "quickstart", "skipped": "no model"}],
    }
    facts = {"time": "2026-12-01", "device": "GPU A", "commit": "abc", "packages": {"torch": "2"}}
    return {
        "suite": 1,
        "quick": False,
        "facts": facts,
        "parts": {name: {"seconds": 1.0, "rows": rows} for name, rows in parts.items()},
        **changes,
    }


def write(folder: Path, **files: dict[str, Any]) -> Path:
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def lines(text: str) -> dict[str, str]:
    """The lines of the goals' table, by what they are about."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cell[1]: cell[3] if len(cell) > 3 else "" for cell in cells if len(cell) > 2}


def test_the_page_is_current(report: ModuleType) -> None:
    written = (FOLDER / "README.md").read_text("utf-8")
    assert written == report.page(FOLDER / "results"), "run: python benchmarks/report.py"


def test_without_gpu_results_the_columns_are_empty(report: ModuleType, tmp_path: Path) -> None:
    text = report.page(write(tmp_path))
    assert "No GPU was at hand" in text and "x |  |" in text
    assert report.gpu_results(tmp_path) is None


def test_a_dry_run_is_no_measurement(report: ModuleType, tmp_path: Path) -> None:
    assert report.gpu_results(write(tmp_path, dry=suite(quick=True))) is None
    assert report.cpu_results(tmp_path) == []


def test_the_newest_gpu_results_are_shown(report: ModuleType, tmp_path: Path) -> None:
    old = suite(facts={**suite()["facts"], "time": "2026-11-30"})
    name, data = report.gpu_results(write(tmp_path, a=suite(), b=old))
    assert (name, data["facts"]["time"]) == ("a.json", "2026-12-01")


def test_goals_are_read_off_the_rows(report: ModuleType, tmp_path: Path) -> None:
    text = report.page(write(tmp_path, a=suite()))
    found = lines(text)
    assert found["forward, 2 to 16 rows"] == "3.00x"
    assert found["backward, 32 to 256 rows"] == "1.50x"
    # what was wrong or not measured has no figure
    assert found["forward, 1 row"] == found["1024 rows"] == ""
    assert found["against unsloth's calls, all recomputed"] == "1.20x"
    assert found["peak memory over that of unsloth's calls"] == "1.00x"
    assert "| correctness | 1 | 1 | 0 |" in text and "| quickstart | 0 | 0 | 1 |" in text
    assert "GPU A" in text and "commit abc" in text and "No GPU was at hand" not in text


def test_cpu_results_of_any_form_become_tables(report: ModuleType, tmp_path: Path) -> None:
    wide = {"median_ms": 2.0, "q1_ms": 1.0, "q3_ms": 3.0}
    slow = {**wide, "median_ms": 3.0}
    long = {"tokens_per_s": {"median": 500.0, "q1": 490.0, "q3": 510.0}, "step_s": [1.0, 2.0]}
    text = report.page(
        write(
            tmp_path,
            linear={"cases": [{"rows": 512, "variants": {"bf16": wide, "nf4": slow}}]},
            step={"cases": [{"threads": 2, "variants": {"qtune": long}}]},
            rows={"rows": [{"variant": "qtune", "tokens_per_s": 700.5, "runs": [1]}]},
        )
    )
    assert "| 512 | 2.00 (1.00-3.00) | 3.00 (1.00-3.00) 1.50x |" in text
    assert (
        "threads 2.\n\n| variant | tokens_per_s |\n| --- | --- |\n| qtune | 500 (490-510) |" in text
    )
    assert "### rows\n\n| variant | tokens_per_s |\n| --- | --- |\n| qtune | 700 |" in text


def test_the_chart_is_the_same_file_every_time(report: ModuleType, tmp_path: Path) -> None:
    rows = suite()["parts"]["kernels"]["rows"]
    for name in ("a.svg", "b.svg"):
        report.plot_speedups(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "4096x4096 backward" in (tmp_path / "a.svg").read_text()
