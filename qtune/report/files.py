"""The files of a run folder that the page is drawn from; a stage that has not run has left none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune.run_folder import RunFolder
from qtune.train.log import read_metrics

# what rows of earlier releases lack
NOT_MEASURED: dict[str, Any] = {
    **dict.fromkeys(
        ("nats", "standard_error", "recovery", "metric", "interval", "p_value", "text")
    ),
    "fields": {},
    "tasks": [],
}


@dataclass(frozen=True)
class Files:
    """What a run has left: None or empty where there is no file."""

    recipe: str | None
    environment: dict[str, Any] | None
    plan: dict[str, Any] | None
    training: list[dict[str, Any]]
    """Lines of metrics.jsonl with a training loss."""
    held_out: list[dict[str, Any]]
    """Lines of metrics.jsonl with a held-out loss."""
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    """Prompts of the recipe's suite with the answers of each model."""
    merge: dict[str, Any] | None
    """Which merge was chosen, and why."""
    merged_layers: list[dict[str, Any]]
    """The adapter's change and the error of quantization of each layer, relative to its weights."""
    exports: list[dict[str, Any]]
    """qtune.json of each export, with the name of its folder."""

    @property
    def judged(self) -> bool:
        """Whether the run learned from preferences: its loss is one of rows and not of tokens."""
        return any("margin" in line for line in self.training)

    @property
    def peak_bytes(self) -> int | None:
        """Most memory that training took."""
        return max((line["peak_memory_bytes"] for line in self.training), default=None)


def read(run: RunFolder) -> Files:
    """Everything there is."""
    metrics = read_metrics(run.path)
    evaluation = _evaluation(run)
    merge = run.read("merge.json")
    # the layers alone, or with the choice
    layers = merge if isinstance(merge, list) else (merge or {}).get("layers", [])
    recipe = run.path / "recipe.yaml"
    return Files(
        recipe=recipe.read_text() if recipe.exists() else None,
        environment=run.read("environment.json"),
        plan=run.read("plan.json"),
        training=[line for line in metrics if "loss" in line],
        held_out=[line for line in metrics if "held_out_loss" in line],
        evaluation=evaluation,
        samples=run.read("samples.json") or [],
        prompts=run.read("prompts.json") or [],
        merge=merge if isinstance(merge, dict) else (evaluation or {}).get("merge"),
        merged_layers=layers,
        exports=_exports(run),
    )


def _evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The table, its rows with all that rows have now: earlier releases measured less."""
    found = run.read("eval.json")
    if found is None:
        return None
    return {**found, "rows": [{**NOT_MEASURED, **row} for row in found["rows"]]}


def _exports(run: RunFolder) -> list[dict[str, Any]]:
    manifests: list[Path] = sorted(run.exports.glob("*/qtune.json"))
    return [
        {"folder": path.parent.name, **run.read(str(path.relative_to(run.path)))}
        for path in manifests
        # a name that starts with a dot is an export that was being written
        if not path.parent.name.startswith(".")
    ]
