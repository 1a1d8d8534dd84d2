"""Figures of a run: a line each in metrics.jsonl, and the trackers that the recipe names.

The file is always written and is what reports are made of; each line is whole or not there. Weights
& Biases, TensorBoard and MLflow get the same figures through accelerate's trackers. These are made
here and handed to accelerate, which would give all of them the same project name. A resumed run
goes on in the run that its trackers have already.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from qtune.errors import UserError
from qtune.files import write_text
from qtune.recipe import Recipe
from qtune.yaml_document import flat

# figures of a step that no two runs share
MEASURED = {
    *("seconds", "tokens_per_s", "supervised_tokens_per_s", "mfu", "data_wait_share"),
    "peak_memory_bytes",
}
METRICS, SAMPLES, TRACKERS = "metrics.jsonl", "samples.jsonl", "trackers.json"


class MetricsLog:
    """Appends to `metrics.jsonl` in the run folder; only the main process writes.

    Lines after `step` are dropped: a run that stopped had gone on past its last checkpoint. So are
    held-out losses and samples after step `looked`, an earlier one where they are due anew.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, step: int, looked: int | None = None
    ) -> None:
        self._folder, self._accelerator = folder, accelerator
        if accelerator.is_main_process:
            for name in (METRICS, SAMPLES):
                _drop_after(folder / name, step, step if looked is None else looked)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line for a step."""
        self._append(METRICS, [{"step": step, **values}])
        self._accelerator.log(values, step=step)

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Add answers that the model gave after a step, at least one, with the same keys in each.

        They go to `samples.jsonl`, to Weights & Biases and TensorBoard as a table, and to MLflow as
        that file.
        """
        self._append(SAMPLES, [{"step": step, **row} for row in rows])
        for tracker in self._accelerator.trackers:
            match tracker.name:
                case "wandb":
                    table = [[str(value) for value in row.values()] for row in rows]
                    tracker.log_table("samples", columns=list(rows[0]), data=table, step=step)
                case "tensorboard":
                    tracker.log({"samples": _markdown(rows)}, step=step)
                case "mlflow":
                    tracker.log_artifact(str(self._folder / SAMPLES))

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self._accelerator.is_main_process:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, oldest first; none where there is no file.

    A last line without its end, from a process that was killed while it wrote, is left out.
    """
    return _read(folder / METRICS)


def tracker_names(recipe: Recipe) -> list[str]:
    """The trackers that the recipe asks for, by their names in accelerate and among packages."""
    settings = asdict(recipe.log)
    return [name for name in ("wandb", "tensorboard", "mlflow") if settings[name]]


def check_trackers(recipe: Recipe) -> None:
    """Raises UserError where a tracker is not installed, not logged in to, or not to be reached.

    To be called before anything is loaded or written.
    """
    for name in tracker_names(recipe):
        if find_spec(name) is None:
            raise UserError(f"log.{name} needs a package: pip install {name}")
    if recipe.log.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        _check_wandb()
    # several processes would get in each other's way where it makes a new database
    if recipe.log.mlflow and os.environ.get("RANK", "0") == "0":
        _check_mlflow()


def _check_wandb() -> None:
    # takes a second, and only runs that use it pay
    import wandb

    if not wandb.api.api_key:
        raise UserError(
            "log.wandb: not logged in to Weights & Biases; run `wandb login`, keep the figures "
            "here with WANDB_MODE=offline, or set log.wandb to null"
        )


def _check_mlflow() -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.search_experiments(max_results=1)
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"log.mlflow: cannot keep runs at {mlflow.get_tracking_uri()}; MLFLOW_TRACKING_URI "
            f"says where (a server, or sqlite:///FILE): {error}"
        ) from error


def start_trackers(recipe: Recipe, folder: Path, accelerator: Accelerator, step: int = 0) -> None:
    """Open the recipe's trackers for a run that stands at `step`; MetricsLog writes to them.

    What is kept in files goes to the run folder; MLflow's own variables say where its runs go.
    """
    names = tracker_names(recipe)
    if not names:
        return
    known = _known_runs(folder) if step else {}
    accelerator.log_with = [_tracker(name, recipe, folder, known, step) for name in names]
    # trackers that know the run have its recipe
    accelerator.init_trackers("", None if known else _settings(recipe))
    if accelerator.is_main_process:
        write_text(folder / TRACKERS, json.dumps(_run_ids(accelerator.trackers)) + "\n")


def _tracker(
    name: str, recipe: Recipe, folder: Path, known: dict[str, str], step: int
) -> GeneralTracker:
    run = known.get(name)
    match name:
        case "wandb":
            again = {"id": run, "resume": "allow"} if run else {}
            return WandBTracker(recipe.log.wandb, dir=str(folder), **again)
        case "mlflow":
            return MLflowTracker(recipe.log.mlflow, run_id=run, run_name=folder.name)
        case _:
            # steps that are done again take the place of those behind the checkpoint
            again_from = {"purge_step": step + 1} if step else {}
            return TensorBoardTracker("tensorboard", folder, **again_from)


def _run_ids(trackers: Sequence[GeneralTracker]) -> dict[str, str]:
    """What the trackers call the run, where they have a name for it."""
    runs = {t.name: t.tracker for t in trackers}
    ids = {"wandb": lambda run: run.id, "mlflow": lambda run: run.info.run_id}
    return {name: ids[name](run) for name, run in runs.items() if name in ids}


def _known_runs(folder: Path) -> dict[str, str]:
    path = folder / TRACKERS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `train.lr` and so on, each a number, a truth value or text."""
    leaves = {key: value for key, value in flat(asdict(recipe)).items() if value != {}}
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in leaves.items()}


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _drop_after(path: Path, step: int, looked: int) -> None:
    """Leave lines up to the step in a file; those without a training loss up to `looked`."""
    if path.exists():
        lines = _read(path) if step else []
        kept = [line for line in lines if line["step"] <= (step if "loss" in line else looked)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
