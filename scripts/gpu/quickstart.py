"""Part (d): the quickstart recipe from beginning to end, and the exact match it ends with."""

import math
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from gpu.case import Case, Context, finite
from gpu.facts import ROOT
from qtune import recipe_yaml, run
from qtune.evaluate import compare
from qtune.train.log import read_metrics

# the CPU ends at 0.9 of 60 answers
LEAST_EXACT_MATCH = 0.8
QUICK = (
    "data.train=demo:train?rows=12",
    "data.validation=demo:validation?rows=4",
    "data.test=demo:test?rows=2",
    "data.max_length=512",
    "train.steps=2",
    "train.warmup_steps=0",
    "train.batch_size=4",
    "evaluate.max_new_tokens=2",
    "export=[adapter]",
)


def cases(context: Context) -> list[Case]:
    """The one case."""
    return [Case("quickstart", partial(_run, context))]


def _run(context: Context) -> dict[str, Any]:
    """What the table of the run says of the tuned model, with the time it took."""
    if context.model is None:
        return {"skipped": "no --model: a GPU machine without network has to be given one"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        overrides = [f"model={context.model.resolve()}", f"run={path}"]
        recipe = recipe_yaml.load(
            ROOT / "recipes/quickstart.yaml", overrides + list(QUICK if context.quick else ())
        )
        start = time.perf_counter()
        run.train(recipe)
        seconds = time.perf_counter() - start
        table = compare.read(path / "eval.json")
        speeds = [m["tokens_per_s"] for m in read_metrics(path) if "tokens_per_s" in m]
    tuned = next(row for row in table.rows if row.name == table.trained)
    least = 0.0 if context.quick else LEAST_EXACT_MATCH
    return {
        "seconds": seconds,
        "train_tokens_per_s": median(speeds),
        "exact_match": tuned.exact_match,
        "answers": tuned.answers,
        "models": [_figures(row) for row in table.rows],
        "ok": math.isfinite(tuned.loss) and (tuned.exact_match or 0.0) >= least,
    }


def _figures(row: compare.Row) -> dict[str, Any]:
    return {key: finite(it) if isinstance(it, float) else it for key, it in asdict(row).items()}
