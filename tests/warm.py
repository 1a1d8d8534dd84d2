"""Processes of their own for tests, without the seconds that imports take.

They are forked from one server, which has imported what training needs and does nothing else. What
several of them do together is started as torchrun would: ranks that find each other by variables.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = [
    "accelerate",
    "peft",
    "qtune.run",
    "qtune.cli",
    "qtune.model.sharded",
    "qtune.train.loop",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
]
TIMEOUT_SECONDS = 300


def context() -> ForkServerContext:
    """What makes processes that have imported LIBRARIES."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(LIBRARIES)
    return made


def start(out: Path, what: Callable[..., Any], *arguments: Any, **variables: str) -> BaseProcess:
    """A process that calls `what`; what it prints goes to the end of the file `out`.

    Its environment is that of the caller with these variables.
    """
    given = (str(out), os.environ | variables, what, arguments)
    process = context().Process(target=_call, args=given, daemon=True)
    process.start()
    return process


def run_ranks(program: Path, *arguments: object, num_processes: int = 2) -> str:
    """What the processes of a distributed program print; AssertionError where one fails."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    words = [str(each) for each in (program, *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"rank-{rank}") for rank in range(num_processes)]
        ranks = [
            start(out, _main, words, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank, out in enumerate(outs)
        ]
        codes = [_ended(rank) for rank in ranks]
        said = "\n".join(out.read_text() for out in outs)
    assert codes == [0] * num_processes, said
    return said


def _ended(process: BaseProcess) -> int | None:
    """The exit code of a process; None where it had to be killed for the time it took."""
    process.join(TIMEOUT_SECONDS)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def _call(
    out: str, environment: dict[str, str], what: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Call `what` in an environment, printing to a file, and exit with what it returns."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(what(*arguments))


def _main(words: list[str]) -> None:
    """Run a program with its arguments, as `python PROGRAM ARGUMENTS` does."""
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
