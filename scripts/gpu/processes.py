"""A part of the suite in processes of its own, and the rows that they leave.

A case that fails takes its process with it: after an error on the GPU nothing there can be trusted.
It is recorded with its error, and a fresh process goes on behind it. A row is two lines of a file,
one that begins the case and one with its result, so that whatever happens it is known how far a
process came. The cases of a part that is not timed are dealt out to many processes at once,
because each compiles its own kernels.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from gpu.case import Context

# seconds: together less than nine minutes
BUDGETS = {"correctness": 105, "kernels": 170, "steps": 155, "quickstart": 90}
# processes on a GPU; what is timed has the GPU to itself
PROCESSES = {"correctness": 12}
# what a process may take beyond its time to end by itself
GRACE = 5
# less is not worth the start of a process
LEAST_SECONDS = 15
ERROR_LINES = 12
NO_TIME = "no time was left for it"

Row = dict[str, Any]


class Share(NamedTuple):
    """Which cases of a part a process has: every `of`-th, from number `first`."""

    part: str
    first: int = 0
    of: int = 1


def run_share(share: Share, context: Context, rows: Path, deadline: float) -> None:
    """Run the cases behind those in the file `rows`, until time is up."""
    done = len(read_rows(rows))
    cases = import_module(f"gpu.{share.part}").cases(context)[share.first :: share.of]
    for case in cases[done:]:
        _add_line(rows, {"case": case.name})
        _add_line(rows, {"skipped": NO_TIME} if time.monotonic() > deadline else case.run())


def supervise(part: str, context: Context) -> dict[str, Any]:
    """The seconds that a part took, and its rows."""
    started = time.monotonic()
    deadline = started + BUDGETS[part]
    of = PROCESSES.get(part, 1) if context.on_gpu else 1
    # what a case leaves for those behind it lies there too
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(of) as pool:
        environment = os.environ | {"TMPDIR": folder, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if not context.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        shares = [Share(part, first, of) for first in range(of)]
        files = [Path(folder) / f"rows{first}" for first in range(of)]
        see_through = partial(_see_through, deadline=deadline, environment=environment)
        list(pool.map(see_through, shares, files))
        rows = [row for file in files for row in read_rows(file)]
    return {"seconds": time.monotonic() - started, "rows": rows}


def read_rows(path: Path) -> list[Row]:
    """A row for each case, from the line that begins it and that of its result."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [begun | result for begun, result in zip(lines[::2], lines[1::2], strict=True)]


def _see_through(share: Share, rows: Path, deadline: float, environment: dict[str, str]) -> None:
    """Start processes for a share until all of its cases have a row, or time is up."""
    rows.touch()
    while error := _attempt(share, rows, deadline, environment):
        begun = len(rows.read_text().splitlines()) % 2
        if time.monotonic() > deadline - LEAST_SECONDS:
            _end(rows, begun, error)
            return
        if not begun:
            # it died before its first case: there is nothing to go on behind
            _add_line(rows, {"case": share.part})
        _add_line(rows, {"ok": False, "error": error})
        if not begun:
            return


def _end(rows: Path, begun: int, error: str) -> None:
    """Close the case that was begun, and say that others were left out."""
    if begun:
        _add_line(rows, {"skipped": f"{NO_TIME}: {error}"})
    _add_line(rows, {"case": "those behind it"})
    _add_line(rows, {"skipped": NO_TIME})


def _attempt(share: Share, rows: Path, deadline: float, environment: dict[str, str]) -> str:
    """Let a process do what is left of a share; what went wrong, or nothing."""
    left = max(0.0, deadline - time.monotonic())
    numbers = [str(number) for number in share[1:]]
    options = ["--share", share.part, *numbers, "--rows", str(rows), "--seconds", str(left)]
    command = [sys.executable, *sys.argv, *options]
    try:
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, timeout=left + GRACE
        )
    except subprocess.TimeoutExpired:
        return "it took longer than the time that was left for the part"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return ("\n".join(lines[-ERROR_LINES:]) or "no message") if done.returncode else ""


def _add_line(rows: Path, fields: Row) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(fields, allow_nan=False) + "\n")
