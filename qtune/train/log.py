"""Figures of a run: one JSON line each in metrics.jsonl, and to Weights & Biases where the recipe asks for it."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class MetricsLog:
    """Appends to `metrics.jsonl` in the run folder; only the main process writes.

    Lines after `step`, left by a run that went on past its last checkpoint before it stopped, are dropped.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int) -> None:
        self._accelerator = accelerator
        self._path = folder / "metrics.jsonl"
        if accelerator.is_main_process:
            kept = [m for m in read_metrics(folder) if m["step"] <= step] if step else []
            self._path.write_text("".join(json.dumps(m) + "\n" for m in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line for a step."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, oldest first; none where there is no file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
