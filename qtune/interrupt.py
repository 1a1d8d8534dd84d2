"""Ctrl-C and SIGTERM: the first one lets a training end its step and save, the second ends it.

A signal may reach one process of a run only (`kill`), or all of them, some twice: a terminal sends
Ctrl-C to the launcher and to the processes, and the launcher passes it on. So a run stops when any
process was asked, which the loop finds out by summing `Stop.flags` along with the loss, and under a
launcher a signal that comes right behind the first one is taken for its echo.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# seconds in which a launcher passes a signal on to processes that have had it already
ECHO = 2.0


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """What shells report for a process that ends by the signal: 130 or 143."""
        return 128 + self.signal


class Stop:
    """Which signals this process has had since it began to listen."""

    def __init__(self) -> None:
        self._had = dict.fromkeys(SIGNALS, 0.0)
        self._first: float | None = None

    @property
    def flags(self) -> tuple[float, ...]:
        """One number per signal, to be summed over the processes: 0 where nobody had it."""
        return tuple(self._had.values())

    def raise_if(self, flags: Sequence[float]) -> None:
        """Raises Interrupted where the summed flags say that some process was asked to stop."""
        for number, asked in zip(SIGNALS, flags, strict=True):
            if asked:
                raise Interrupted(number)

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal; raises Interrupted where it is not the first one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._had[signal.Signals(number)] = 1.0
            _say("stopping after this step, with a checkpoint; once more stops at once\n")
        elif now - self._first > _echo():
            raise Interrupted(number)


def at_once(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that raises Interrupted."""
    raise Interrupted(number)


@contextmanager
def listening() -> Iterator[Stop]:
    """A Stop that takes the signals of the process while the block runs."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        # Python allows handlers in the main thread only
        yield stop
        return
    before = {number: signal.signal(number, stop.take) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _echo() -> float:
    return ECHO if "LOCAL_WORLD_SIZE" in os.environ else 0.0


def _say(text: str) -> None:
    """Write to stderr past Python's buffers, which a signal may have caught half-way."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, text.encode())
