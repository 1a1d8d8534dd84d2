"""Lines of metrics.jsonl, and trackers that get the same figures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qtune.errors import UserError
from qtune.recipe import Recipe
from qtune.train import log
from qtune.train.log import (
    MetricsLog,
    check_trackers,
    read_metrics,
    start_trackers,
    tracker_names,
)

SAMPLES = [{"prompt": "1 | 2\n3", "answer": "a"}, {"prompt": "4", "answer": "b"}]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    made = Accelerator()
    yield made
    made.end_training()


def test_lines_are_steps_with_their_figures(tmp_path: Path, accelerator: Accelerator) -> None:
    written = MetricsLog(tmp_path, accelerator, 0)
    written.write(1, {"loss": 2.5})
    written.write(2, {"loss": 1.25, "lr": 1e-3})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 1.25, "lr": 1e-3},
    ]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
def test_what_lies_behind_the_checkpoint_is_dropped(
    tmp_path: Path, accelerator: Accelerator, step: int, kept: list[int]
) -> None:
    lines = "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 2, 3))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(lines)
    written = MetricsLog(tmp_path, accelerator, step)
    written.write(10, {})
    written.write_samples(10, SAMPLES)
    assert [m["step"] for m in read_metrics(tmp_path)] == [*kept, 10]
    samples = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [*kept, 10, 10]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_held_out_losses_that_are_due_anew_are_dropped(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    lines: list[dict[str, Any]] = [{"step": 2, "loss": 2.0}, {"step": 2, "held_out_loss": 2.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLog(tmp_path, accelerator, 2, 1)
    assert read_metrics(tmp_path) == lines[:1]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert read_metrics(tmp_path) == []


def test_no_file_no_figures(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_wandb_without_login_is_refused_before_the_run(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(tiny_recipe(log={"wandb": "project"}))
    # in a process of its own: wandb reads the environment once
    code = (
        "import qtune.train.log as log; from qtune.recipe import Log\n"
        "from types import SimpleNamespace as N\n"
        "try: log.check_trackers(N(log=Log(wandb='p')))\nexcept log.UserError as e: print(e)"
    )
    home = {"HOME": "/nonexistent", "NETRC": "/nonexistent/netrc", "WANDB_MODE": "online"}
    clean = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | home, capture_output=True, text=True, check=True)
    assert "log.wandb: not logged in" in done.stdout and "WANDB_MODE=offline" in done.stdout


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    name: str, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(log={name: True if name == "tensorboard" else "project"})
    assert tracker_names(recipe) == [name]
    monkeypatch.setattr(log, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"log.{name} needs a package: pip install {name}"):
        check_trackers(recipe)


def test_no_tracker_nothing_is_asked(
    tiny_recipe: Callable[..., Recipe],
    accelerator: Accelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(log, "find_spec", lambda package: None)
    check_trackers(tiny_recipe())
    start_trackers(tiny_recipe(), tmp_path, accelerator)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_figures_once_also_of_a_resumed_run(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(log={"tensorboard": True})
    for start, shift in ((0, 0.0), (2, 10.0)):
        accelerator = Accelerator()
        start_trackers(recipe, tmp_path, accelerator, start)
        written = MetricsLog(tmp_path, accelerator, start)
        for step in range(start + 1, start + 4):
            written.write(step, {"loss": step + shift})
        written.write_samples(step, SAMPLES)
        accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
    (table,) = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val
    assert table.decode() == ("| prompt | answer |\n| --- | --- |\n| 1 \\| 2<br>3 | a |\n| 4 | b |")
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


class Recorder(GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers what it is told."""

    requires_logging_directory = False

    def __init__(self, name: str, told: list[Any]) -> None:
        super().__init__(_blank=True)
        self.name, self._told = name, told

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._told.append((self.name, step, values))

    def log_table(self, name: str, columns: list[str], data: list[Any], step: int) -> None:
        self._told.append((self.name, step, name, columns, data))

    def log_artifact(self, path: str) -> None:
        self._told.append((self.name, Path(path).read_text().count("\n")))


def test_trackers_get_figures_and_samples(tmp_path: Path) -> None:
    accelerator, told = Accelerator(), list[Any]()
    accelerator.trackers = [Recorder(name, told) for name in ("wandb", "mlflow")]
    written = MetricsLog(tmp_path, accelerator, 0)
    written.write(1, {"loss": 2.5})
    written.write_samples(1, SAMPLES)
    rows = [["1 | 2\n3", "a"], ["4", "b"]]
    assert told == [
        ("wandb", 1, {"loss": 2.5}),
        ("mlflow", 1, {"loss": 2.5}),
        ("wandb", 1, "samples", ["prompt", "answer"], rows),
        ("mlflow", 2),
    ]


def test_each_tracker_has_its_own_name_and_goes_on_in_its_run(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tiny_recipe(log={"wandb": "project", "mlflow": "experiment"})
    started: list[Any] = []

    class FakeWandb(Recorder):
        def __init__(self, project: str, **options: Any) -> None:
            super().__init__("wandb", [])
            started.append((project, options))
            self.tracker = type("Run", (), {"id": "w1"})

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            started.append(values)

    def begin(tracker: Any) -> None:
        started.append((tracker.experiment_name, tracker.run_id, tracker.run_name))
        tracker.active_run = type("Run", (), {"info": type("Info", (), {"run_id": "m1"})})

    monkeypatch.setattr(log, "WandBTracker", FakeWandb)
    monkeypatch.setattr(MLflowTracker, "start", begin)
    monkeypatch.setattr(MLflowTracker, "store_init_configuration", lambda *values: None)
    start_trackers(recipe, tmp_path, Accelerator())
    first, second, settings = started
    assert first == ("project", {"dir": str(tmp_path)})
    assert second == ("experiment", None, tmp_path.name)
    assert settings["train.lr"] == recipe.train.lr and settings["run"] == str(recipe.run)
    assert all(isinstance(value, (int, float, str)) for value in settings.values())

    started.clear()
    start_trackers(recipe, tmp_path, Accelerator(), step=5)
    assert started == [
        ("project", {"dir": str(tmp_path), "id": "w1", "resume": "allow"}),
        ("experiment", "m1", tmp_path.name),
    ]


def test_a_store_of_mlflow_that_cannot_be_reached_is_named(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    class MlflowException(Exception):
        pass

    def search_experiments(max_results: int) -> None:
        raise MlflowException("connection refused")

    mlflow: Any = ModuleType("mlflow")
    mlflow.search_experiments, mlflow.MlflowException = search_experiments, MlflowException
    mlflow.get_tracking_uri = lambda: "http://nowhere"
    monkeypatch.setattr(log, "find_spec", lambda package: package)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", mlflow)
    with pytest.raises(UserError, match=r"log.mlflow: .*http://nowhere.*connection refused"):
        check_trackers(tiny_recipe(log={"mlflow": "experiment"}))
