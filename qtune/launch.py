"""`qtune train --nproc N`: one process for each device of this machine, by torchrun's own agent.

The agent starts the ranks, ends them all when one fails, and passes signals on; here is decided
what is seen of that. The first rank speaks as a single process would. What the others print is kept
aside: one mistake of the user is made by all ranks at once, and a rank that dies breaks the
connections of those that wait for it. So the ranks leave the tracebacks of their deaths in files,
and shown is only what the rank that failed first has to say.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from qtune.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import LogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# tells a rank that its last words are collected here
LAUNCHED = "QTUNE_LAUNCHED"
# where torchrun looks for the last words of a rank
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
USER_ERROR = 2
# prctl: the signal that this process gets when its parent ends
PR_SET_PDEATHSIG = 1
# a rank that is asked to end finishes its step and writes a checkpoint
SECONDS_TO_SAVE = 3600
# what shells report for a process that was ended by a signal
SIGNALLED = 128
# ends by which a rank follows another, and is not the cause
FOLLOWING = {-signal.SIGTERM, SIGNALLED + signal.SIGTERM, SIGNALLED + signal.SIGINT}
MOST_LINES = 20
# less than the 30 that torchrun gives the other ranks to end
SECONDS_TO_NOTICE = 20


def start(
    arguments: Sequence[str], num_processes: int, program: Sequence[str] = ("-m", "qtune")
) -> int:
    """Exit code of `qtune ARGUMENTS` run in so many processes on this machine.

    It is that of the rank that failed first, whose message is printed. Raises UserError where there
    are not so many GPUs.
    """
    _check(num_processes)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="qtune-ranks-") as folder:
        logging.disable(logging.ERROR)
        try:
            _launch([*program, *arguments], num_processes, Path(folder))
        except ChildFailedError as error:
            return _explain(error.failures, Path(folder))
        except SignalException as end:
            return SIGNALLED + end.sigval
        finally:
            logging.disable(logging.NOTSET)
            _end_children()
    return 0


def is_rank() -> bool:
    """Whether this process was started by `start`."""
    return LAUNCHED in os.environ


def serve(main: Callable[[], int]) -> int:
    """Exit code of `main`, run as a rank that its launcher speaks for.

    When the launcher is gone, the rank is asked to stop.
    """
    sys.excepthook = _leave_last_words
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    code = main()
    _ignore_signals()
    return code


def _leave_last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Let an unexpected error be shown by the launcher, if it was the first."""
    text = "".join(traceback.format_exception(kind, error, trace))
    words = {"message": text, "timestamp": int(time.time())}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(words), encoding="utf-8")
    _ignore_signals()


def _ignore_signals() -> None:
    """Of a process that is about to end anyway nothing more is to be seen."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _check(num_processes: int) -> None:
    if num_processes < 1:
        raise UserError(f"--nproc {num_processes}: at least 1 process is needed")
    import torch

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_processes:
        raise UserError(f"--nproc {num_processes}: this machine has {num_gpus} GPUs")


def _launch(command: Sequence[str], num_processes: int, folder: Path) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ[LAUNCHED] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_SAVE)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="qtune",
        rdzv_backend="c10d",
        # any free port, and no name that this machine may not know itself by
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=_kept_aside(num_processes, folder),
    )
    elastic_launch(config, sys.executable)(*command)


def _kept_aside(num_processes: int, folder: Path) -> "LogsSpecs":
    """What ranks print goes to files, but for the first."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    redirects = {rank: Std.ALL for rank in range(1, num_processes)}
    return DefaultLogsSpecs(log_dir=str(folder), redirects={0: Std.NONE, **redirects})


def _explain(failures: Mapping[int, "ProcessFailure"], folder: Path) -> int:
    """Print what the rank that failed first has to say, unless it has; its exit code."""
    causes = {rank: each for rank, each in failures.items() if each.exitcode not in FOLLOWING}
    if not causes:
        # one of them was asked to stop, and they all did
        return max(_exit_code(each) for each in failures.values())
    rank, first = min(causes.items(), key=lambda cause: _order(cause[1]))
    if Path(first.error_file).is_file():
        words = first.message
    elif first.exitcode < 0:
        killed = "; was memory short?" if first.exitcode == -signal.SIGKILL else ""
        words = f"process {rank} was ended by {signal.Signals(-first.exitcode).name}{killed}"
    else:
        words = "" if rank == 0 else _printed(folder, rank)
    if words:
        print(words.rstrip(), file=sys.stderr)
    return _exit_code(first)


def _exit_code(failure: "ProcessFailure") -> int:
    code = failure.exitcode
    return code if code > 0 else SIGNALLED - code


def _order(failure: "ProcessFailure") -> tuple[bool, int, int]:
    """Sorts the rank that failed by itself first.

    A mistake of the user is never the result of another rank's end. A rank that is killed may be
    noticed after others have lost their connection to it; the agent itself kills only those that
    have not followed for longer than that takes.
    """
    noticed_late = SECONDS_TO_NOTICE if failure.exitcode < 0 else 0
    return failure.exitcode != USER_ERROR, failure.timestamp - noticed_late, failure.local_rank


def _printed(folder: Path, rank: int) -> str:
    """The last lines that a rank printed to stderr."""
    (file,) = folder.glob(f"*/*/{rank}/stderr.log")
    return "\n".join(file.read_text("utf-8", "replace").splitlines()[-MOST_LINES:])


def _end_children() -> None:
    """Nothing that was started outlives its launcher, as after a second Ctrl-C."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
