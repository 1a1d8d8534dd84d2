"""What becomes of cases that fail, of parts that do not start, and of time that runs out."""

from pathlib import Path

import pytest
import torch
from gpu import processes
from gpu.case import Context
from gpu.processes import BUDGETS, GRACE, NO_TIME, PROCESSES, Share

CPU = Context(torch.device("cpu"), quick=True, seed=0)


def supervised(monkeypatch, attempts: list[tuple[str, str]], part: str = "kernels") -> list[dict]:
    """The rows when each process writes those lines and ends with that error."""
    left = iter(attempts)

    def attempt(share: Share, rows: Path, *unused: object) -> str:
        lines, error = next(left)
        rows.write_text(rows.read_text() + lines)
        return error

    monkeypatch.setattr(processes, "_attempt", attempt)
    rows = processes.supervise(part, CPU)["rows"]
    assert next(left, None) is None
    return rows


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(monkeypatch) -> None:
    attempts = [
        ('{"case": "a"}\n{"ok": true}\n{"case": "b"}\n', "RuntimeError: broken"),
        ('{"case": "c"}\n{"ok": true}\n', ""),
    ]
    assert supervised(monkeypatch, attempts) == [
        {"case": "a", "ok": True},
        {"case": "b", "ok": False, "error": "RuntimeError: broken"},
        {"case": "c", "ok": True},
    ]


def test_a_part_that_does_not_start_is_a_failure(monkeypatch) -> None:
    error = "ImportError: no such module"
    (row,) = supervised(monkeypatch, [("", error)])
    assert row == {"case": "kernels", "ok": False, "error": error}


def test_a_case_that_outlasts_the_budget_is_no_failure(monkeypatch) -> None:
    monkeypatch.setitem(BUDGETS, "kernels", 1)
    first, rest = supervised(monkeypatch, [('{"case": "a"}\n', "it took longer")])
    assert first == {"case": "a", "skipped": f"{NO_TIME}: it took longer"}
    assert rest["skipped"] == NO_TIME


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows"
    path.touch()
    return path


def test_what_the_budget_has_no_time_for_is_skipped(rows: Path) -> None:
    processes.run_share(Share("quickstart"), CPU, rows, deadline=0.0)
    assert processes.read_rows(rows) == [{"case": "quickstart", "skipped": NO_TIME}]


def test_shares_are_all_cases_once(tmp_path: Path) -> None:
    seen = []
    for first in range(3):
        path = tmp_path / str(first)
        # what was done before is not done again
        path.write_text('{"case": "one more"}\n{"ok": true}\n' if first == 0 else "")
        processes.run_share(Share("correctness", first, 3), CPU, path, deadline=0.0)
        seen += [row["case"] for row in processes.read_rows(path)]
    cases = processes.import_module("gpu.correctness").cases(CPU)
    assert sorted(seen) == sorted(["one more", *(case.name for case in cases[1:])])


def test_the_budgets_fit_nine_minutes() -> None:
    assert sum(BUDGETS.values()) + GRACE * len(BUDGETS) <= 540


def test_what_is_timed_has_the_gpu_to_itself() -> None:
    assert set(PROCESSES) == {"correctness"}
