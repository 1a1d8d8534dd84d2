import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warm

from qtune import cli, recipe_yaml
from qtune.recipe import Recipe
from qtune.train.log import read_metrics

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_resume.py"
SETTINGS = {
    "train": {
        "steps": 12,
        "eval_every": 5,
        "save_every": 1,
        "micro_batch_tokens": 300,
        "ema_decay": 0.9,
        "keep_best": True,
    },
    "lora": {"dropout": 0.3},
    "evaluate": {"answer_rows": 0},
    "export": (),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_resume", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    return module


class Process:
    """A warm process with the methods of Popen that the script uses."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.args = words
        self._process = warm.start(log, cli.main, words)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode


def start_warm(command: Any, folder: Path, *, resume: bool = False) -> Process:
    """The command's start without the seconds that imports take."""
    words = ["train", str(command.recipe), f"run={folder}", *(["--resume"] if resume else [])]
    return Process(words, folder.with_name(f"{folder.name}.log"))


# with these seeds: a kill in a save and one in a step; a kill of one of two ranks in a save
@pytest.mark.parametrize(("num_processes", "seed", "kills"), [(1, 3, 2), (2, 14, 1)])
def test_killed_runs_end_as_a_whole_one(
    script: ModuleType,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
    seed: int,
    kills: int,
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(recipe_yaml.dump(tiny_recipe(**SETTINGS)))
    if num_processes == 1:
        # with two, the launcher is part of what is killed
        monkeypatch.setattr(script.Command, "start", start_warm)
    command = script.Command(file, [], num_processes)
    script.run_whole(command, tmp_path / "whole")
    survived = script.run_killed(command, tmp_path / "killed", random.Random(seed), kills)
    assert survived == kills, "it ended before it could be killed"
    assert script.trained(tmp_path / "killed") == script.trained(tmp_path / "whole")
    assert len(read_metrics(tmp_path / "whole")) == 12 + 3


def test_one_bit_of_a_figure_counts(script: ModuleType, tmp_path: Path) -> None:
    for name, loss in (("a", 1.5), ("b", 1.5000000000000002)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter/adapter_model.safetensors").write_bytes(b"x")
        line = f'{{"step": 1, "loss": {loss}, "seconds": {loss}}}\n'
        (tmp_path / name / "metrics.jsonl").write_text(line)
    assert script.trained(tmp_path / "a") != script.trained(tmp_path / "b")
    assert script.trained(tmp_path / "a")[0] == [{"step": 1, "loss": 1.5}]
