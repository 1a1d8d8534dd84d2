"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

Only the first process of a run speaks.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
if not console.is_terminal:
    # a log has no width of its own, and the table of a run needs this much
    console.width = 120
# seconds between lines where there is no terminal
LINE_EVERY = 15.0


def say(text: str) -> None:
    """Print a line as it is: file names and tokens may hold what rich takes for markup."""
    console.print(text, markup=False, soft_wrap=True)


class Bar:
    """Progress of one piece of work: `advance` it, with a few words on how it goes."""

    def __init__(self, title: str, total: int | None, done: int, progress: Progress | None) -> None:
        self._title, self._total, self._done = title, total, done
        self._progress = progress
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(title, total=total, completed=done, words="")
        self._started = self._spoke = time.monotonic()
        self._first = done

    def advance(self, count: int = 1, words: str = "") -> None:
        """Count more as done."""
        self._done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, words=words)
        elif time.monotonic() - self._spoke >= LINE_EVERY or self._done == self._total:
            self._say(words)

    def _say(self, words: str) -> None:
        now = time.monotonic()
        passed = now - self._started
        self._spoke = now
        if self._total is None:
            console.print(f"{self._title} {self._done} {words} {_minutes(passed)} done")
            return
        left = passed / (self._done - self._first) * (self._total - self._done)
        console.print(
            f"{self._title} {self._done}/{self._total} {words} "
            f"{_minutes(passed)} done, {_minutes(left)} to go"
        )


@contextmanager
def bar(title: str, total: int | None = None, done: int = 0) -> Iterator[Bar]:
    """A Bar that is shown while the block runs; without a total where the end is not known."""
    if not console.is_terminal or console.quiet:
        yield Bar(title, total, done, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(title, total, done, progress)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
