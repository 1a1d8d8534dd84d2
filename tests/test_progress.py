import io
import time

import pytest
from rich.console import Console

from qtune import progress


@pytest.fixture
def screen(monkeypatch):
    def use(**options):
        out = io.StringIO()
        console = Console(file=out, width=120, highlight=False, **options)
        monkeypatch.setattr(progress, "console", console)
        return out

    return use


def test_without_a_terminal_the_end_is_one_line(screen):
    out = screen()
    with progress.bar("training", 3) as bar:
        for loss in (3, 2, 1):
            bar.advance(words=f"loss {loss}")
    assert out.getvalue() == "training 3/3 loss 1 0:00 done, 0:00 to go\n"


def test_what_is_left_is_told_from_the_speed_since_the_start(screen, monkeypatch):
    out = screen()
    clock = iter([100.0, 160.0, 160.0, 280.0, 280.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.bar("training", 10, done=4) as bar:
        bar.advance()
        bar.advance(2)
    assert out.getvalue().splitlines() == [
        "training 5/10  1:00 done, 5:00 to go",
        "training 7/10  3:00 done, 3:00 to go",
    ]


def test_without_a_total_what_is_done_is_told(screen, monkeypatch):
    out = screen()
    clock = iter([100.0, 105.0, 160.0, 160.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.bar("reading") as bar:
        bar.advance(5)
        bar.advance(5)
    assert out.getvalue() == "reading 10  1:00 done\n"


def test_on_a_terminal_there_is_a_bar(screen):
    out = screen(force_terminal=True)
    with progress.bar("training", 4, done=1) as bar:
        bar.advance(3, words="loss 0.5")
    assert "4/4" in out.getvalue() and "loss 0.5" in out.getvalue()


def test_other_processes_are_silent(screen):
    out = screen(quiet=True, force_terminal=True)
    with progress.bar("training", 1) as bar:
        bar.advance()
    assert out.getvalue() == ""
