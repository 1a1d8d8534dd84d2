"""The launcher as a user meets it: started as a process, its ranks being what they are asked to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from qtune import launch
from qtune.errors import UserError
from qtune.interrupt import ECHO

LAUNCHER = (
    "import sys; from qtune import launch; sys.exit(launch.start(sys.argv[2:], 2, sys.argv[1:2]))"
)
# a rank of qtune whose work is the code it is given
RANK = """
import os, signal, sys, time
from pathlib import Path
from qtune import cli, launch
from qtune.errors import UserError
rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
cli._run = lambda chosen: exec(sys.argv[1])
sys.exit(launch.serve(lambda: cli.main(["doctor"])))
"""
# longer than any test lasts
SLEEP = "time.sleep(60)"


@pytest.fixture
def start(tmp_path: Path):
    """Starts two ranks that run some code; the launcher's process."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    started = []

    def start(code: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LAUNCHER, str(script), code, str(tmp_path)]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
        started.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_share_cores_and_the_first_one_speaks(start, tmp_path):
    code = """if True:
        import json
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"
        seen = {name: os.environ[name] for name in names}
        (folder / f"{rank}.json").write_text(json.dumps(seen))
        print("rank", rank), print("warning of", rank, file=sys.stderr)"""
    assert finish(start(code)) == (0, "rank 0\n", "warning of 0\n")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second | {"RANK": "0", "LOCAL_RANK": "0"}
    assert second["RANK"] == second["LOCAL_RANK"] == "1" and second["WORLD_SIZE"] == "2"
    assert int(second["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_number_of_threads_that_is_set_stays(start):
    code = "print(os.environ['OMP_NUM_THREADS'])"
    assert finish(start(code, OMP_NUM_THREADS="7")) == (0, "7\n", "")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise UserError('the row is bad')", "error: the row is bad\n"),
        (
            f"if rank == 0: {SLEEP}\nraise UserError('the row is bad')",
            "process 1: error: the row is bad\n",
        ),
        (
            # a rank that ends closes its connections before it is gone
            "if rank == 0: time.sleep(1); raise RuntimeError('connection closed')\n"
            "import atexit; atexit.register(time.sleep, 2); raise UserError('the row is bad')",
            "process 1: error: the row is bad\n",
        ),
    ],
    ids=["all", "one", "one behind"],
)
def test_mistake_of_the_user_is_said_once(start, code, message):
    began = time.monotonic()
    assert finish(start(code)) == (2, "", message)
    assert time.monotonic() - began < 30


def test_unexpected_error_keeps_its_traceback_and_nothing_else(start):
    code = f"if rank == 0: {SLEEP}\n1 / 0"
    status, out, err = finish(start(code))
    assert (status, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("ZeroDivisionError: division by zero\n")
    assert err.count("Traceback") == 1


def test_killed_rank_is_named_and_ends_the_others(start):
    code = "time.sleep(1)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "time.sleep(0.3); raise RuntimeError('connection closed')"
    status, _, err = finish(start(code))
    assert status == 128 + signal.SIGKILL
    assert err == "process 1 was ended by SIGKILL; was memory short?\n"


SAVES = """
from qtune.interrupt import listening
with listening() as stop:
    (folder / f"{rank}.began").touch()
    while not any(stop.flags): time.sleep(0.02)
    time.sleep(0.5)
    (folder / f"{rank}.saved").touch()
    stop.raise_if(stop.flags)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_save_when_the_launcher_is_asked_to_end(start, tmp_path, number):
    process = start(SAVES)
    wait_for(tmp_path / "0.began", tmp_path / "1.began")
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 2
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()
    assert err.count("interrupted") == 1 and "Traceback" not in err
    assert not any(rank.is_running() for rank in ranks)


def test_asking_twice_ends_at_once_and_leaves_nobody(start, tmp_path):
    process = start(SAVES.replace("0.5", "60"))
    wait_for(tmp_path / "0.began", tmp_path / "1.began")
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    # what comes sooner is taken for an echo
    time.sleep(ECHO + 0.5)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT
    assert not any(rank.is_running() for rank in ranks)


def test_ranks_end_when_their_launcher_is_killed(start, tmp_path):
    process = start(SAVES)
    wait_for(tmp_path / "0.began", tmp_path / "1.began")
    process.kill()
    wait_for(tmp_path / "0.saved", tmp_path / "1.saved")


def test_number_of_processes_is_checked(monkeypatch):
    with pytest.raises(UserError, match="at least 1"):
        launch.start(["train", "r.yaml"], 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--nproc 3: this machine has 2 GPUs"):
        launch.start(["train", "r.yaml"], 3)


def test_command_line_starts_ranks(tmp_path):
    command = [sys.executable, "-m", "qtune", "train", "missing.yaml", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("missing.yaml") == 1, done.stderr
