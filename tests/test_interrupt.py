import os
import signal
import threading

import pytest

from qtune import interrupt
from qtune.interrupt import Interrupted, Stop, at_once, listening


def test_the_first_signal_is_noted_and_the_second_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted) as end, listening() as stop:
        assert stop.flags == (0.0, 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.flags == (0.0, 1.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.exit_code == 130
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with listening():
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.flags == (1.0, 0.0)
        monkeypatch.setattr(interrupt, "ECHO", 0.0)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("flags", "code"), [((2.0, 0.0), 130), ((0.0, 1.0), 143)])
def test_a_process_that_was_not_asked_stops_with_the_others(
    flags: tuple[float, ...], code: int
) -> None:
    with pytest.raises(Interrupted) as end:
        Stop().raise_if(flags)
    assert end.value.exit_code == code


def test_without_signals_nothing_is_raised() -> None:
    Stop().raise_if((0.0, 0.0))


def test_at_once_raises_what_ctrl_c_raises() -> None:
    with pytest.raises(KeyboardInterrupt) as end:
        at_once(signal.SIGTERM)
    assert isinstance(end.value, Interrupted) and end.value.exit_code == 143


def test_other_threads_listen_to_nothing() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with listening() as stop:
            found.append((stop.flags, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [((0.0, 0.0), before)]
