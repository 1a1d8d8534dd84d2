import json
import os
import subprocess
import sys

import pytest
from accelerate import Accelerator

from qtune.errors import UserError
from qtune.train.log import MetricsLog, check_wandb, read_metrics


def test_lines_are_steps_with_their_figures(tmp_path):
    log = MetricsLog(tmp_path, Accelerator(), 0)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": 1.25, "lr": 1e-3})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 1.25, "lr": 1e-3},
    ]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
def test_what_lies_behind_the_checkpoint_is_dropped(tmp_path, step, kept):
    lines = "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    MetricsLog(tmp_path, Accelerator(), step).write(10, {})
    assert [m["step"] for m in read_metrics(tmp_path)] == [*kept, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert read_metrics(tmp_path) == []


def test_no_file_no_figures(tmp_path):
    assert read_metrics(tmp_path) == []


def test_wandb_without_login_is_refused_before_the_run(tiny_recipe, monkeypatch):
    recipe = tiny_recipe(log={"wandb": "project"})
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(recipe)
    # in a process of its own: wandb reads the environment once
    code = (
        "import sys; from qtune.cli import main; import qtune.train.log as log; from qtune.recipe "
        "import *\nfrom types import SimpleNamespace as N\n"
        "try: log.check_wandb(N(log=Log(wandb='p')))\nexcept log.UserError as e: print(e)"
    )
    home = {"HOME": "/nonexistent", "NETRC": "/nonexistent/netrc", "WANDB_MODE": "online"}
    clean = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | home, capture_output=True, text=True, check=True)
    assert "log.wandb: not logged in" in done.stdout and "WANDB_MODE=offline" in done.stdout


def test_without_wandb_nothing_is_asked(tiny_recipe, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(tiny_recipe())
    with pytest.raises((UserError, ImportError)):
        check_wandb(tiny_recipe(log={"wandb": "project"}))
