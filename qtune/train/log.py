"""Figures of a run: a line each in metrics.jsonl, and Weights & Biases where the recipe says so."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qtune.errors import UserError
from qtune.files import write_text
from qtune.recipe import Recipe


class MetricsLog:
    """Appends to `metrics.jsonl` in the run folder; only the main process writes.

    Lines after `step` are dropped: a run that stopped had gone on past its last checkpoint.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int) -> None:
        self._accelerator = accelerator
        self._path = folder / "metrics.jsonl"
        if accelerator.is_main_process:
            kept = [m for m in read_metrics(folder) if m["step"] <= step] if step else []
            write_text(self._path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line for a step."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, oldest first; none where there is no file.

    A last line without its end, from a process that was killed while it wrote, is left out.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def check_wandb(recipe: Recipe) -> None:
    """Raises UserError where the recipe asks for Weights & Biases and nobody is logged in there."""
    if recipe.log.wandb is None or os.environ.get("WANDB_MODE", "online") != "online":
        return
    # takes a second, and only runs that use it pay
    import wandb

    if not wandb.api.api_key:
        raise UserError(
            "log.wandb: not logged in to Weights & Biases; run `wandb login`, keep the figures "
            "here with WANDB_MODE=offline, or set log.wandb to null"
        )


def start_wandb(recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
    """Open a Weights & Biases run, if the recipe asks for one; its files go to the run folder."""
    if recipe.log.wandb is not None:
        # paths are no JSON
        config = json.loads(json.dumps(asdict(recipe), default=str))
        options = {"wandb": {"dir": str(folder)}}
        accelerator.init_trackers(recipe.log.wandb, config, options)
