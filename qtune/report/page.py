"""Run folder -> report.html: one page without scripts that needs nothing beside itself.

The template says what stands where, page.css how it looks; here is what they show. Everything that
a run wrote is escaped by the template engine; only the charts, made here, are markup. The same
files give the same page.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qtune.files import write_text
from qtune.report import evaluation, headline, merge_plot, numbers, plots
from qtune.report.files import Files, read
from qtune.report.plots import Series
from qtune.report.prompts import Asked, beside
from qtune.report.samples import clipped, laid_out
from qtune.run_folder import RunFolder
from qtune.yaml_document import flat

# widths in pixels that charts are drawn for: a wide page, a telephone, a third of the wide page
WIDE, NARROW, SMALL = 1040, 340, 330
FOLDER = Path(__file__).parent
# figure in metrics.jsonl -> the title of its chart
SMALL_CHARTS = {
    "lr": "Learning rate",
    "tokens_per_s": "Tokens per second",
    "grad_norm": "Gradient norm before clipping",
    "margin": "Margin of rewards",
}


def write_report(run: RunFolder) -> Path:
    """Path of report.html, written from the run's files; it is there whole or not at all."""
    write_text(run.report, render(run))
    return run.report


def render(run: RunFolder) -> str:
    """The page as text."""
    files = read(run)
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(numbers, name)
        for name in ("decimal", "percent", "score", "whole", "disk", "memory")
    }
    environment.filters["clipped"] = clipped
    return environment.get_template("page.html").render(
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        run=run,
        files=files,
        sentence=headline.sentence(files),
        facts=headline.facts(files),
        rows=evaluation.rows(files),
        tokens=evaluation.tokens(files),
        score_title=evaluation.score_title(files),
        suite=evaluation.suite(files),
        fields=evaluation.field_table(files),
        quality_charts=evaluation.quality_charts(files, WIDE, NARROW),
        score_charts=list(evaluation.score_charts(files, SMALL)),
        merge_charts=list(_merge_charts(files)),
        prompts=_prompts(files),
        loss_charts=_loss_charts(files),
        window=plots.smoothed([line["loss"] for line in files.training])[1],
        group=plots.binned(_series(files.training, "loss"), plots.LOSS_POINTS)[1],
        logged="" if run.recipe.log.every == 1 else "logged ",
        small_charts=list(_small_charts(files)),
        memory_charts=_memory_charts(files),
        shades=plots.SHADES,
        other_shade=plots.OTHER_SHADE,
        samples=[laid_out(sample) for sample in files.samples],
        layers=_by_format(files),
        environment=list(_settings(files.environment or {})),
    )


def _prompts(files: Files) -> list[Asked]:
    table = files.evaluation or {"rows": []}
    return [beside(entry, [row["name"] for row in table["rows"]]) for entry in files.prompts]


def _merge_charts(files: Files) -> Iterator[tuple[merge_plot.Kind, Markup]]:
    """Each kind of layer with the chart of its change and its error."""
    kinds = merge_plot.kinds(files.merged_layers)
    limits = merge_plot.limits(kinds)
    for number, kind in enumerate(kinds):
        yield kind, merge_plot.merge_chart(f"merge-{number}", SMALL, kind, limits)


def _loss_charts(files: Files) -> dict[str, Markup]:
    if not files.training and not files.held_out:
        return {}
    training, held_out = _series(files.training, "loss"), _series(files.held_out, "held_out_loss")
    return {
        "wide": plots.loss_chart("loss-wide", WIDE, training, held_out),
        "narrow": plots.loss_chart("loss-narrow", NARROW, training, held_out),
    }


def _small_charts(files: Files) -> Iterator[tuple[str, Markup]]:
    """Title and chart of each figure that was logged."""
    for key, title in SMALL_CHARTS.items():
        series = _series([line for line in files.training if key in line], key)
        if series.steps:
            name = key.replace("_", "-")
            yield title, plots.small_chart(name, SMALL, series, title)


def _memory_charts(files: Files) -> dict[str, Markup]:
    if not files.plan:
        return {}
    parts = {name: size for name, size in files.plan["memory"].items() if name != "total"}
    return {
        "wide": plots.memory_chart("memory-wide", WIDE, parts, files.peak_bytes),
        "narrow": plots.memory_chart("memory-narrow", NARROW, parts, files.peak_bytes),
    }


def _series(lines: list[dict[str, Any]], key: str) -> Series:
    return Series([line["step"] for line in lines], [line[key] for line in lines])


def _by_format(files: Files) -> list[dict[str, Any]]:
    """Layers, weights and bytes of each format in the plan, most bytes first."""
    totals: dict[str, dict[str, Any]] = defaultdict(lambda: {"layers": 0, "weights": 0, "bytes": 0})
    for layer in files.plan["layers"] if files.plan else ():
        total = totals[layer["format"]]
        total["layers"] += 1
        total["weights"] += layer["shape"][0] * layer["shape"][1]
        total["bytes"] += layer["size_bytes"]
    rows = [{"format": name, **total} for name, total in totals.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _settings(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys, joined by points, and values of nested mappings, in their order."""
    for key, value in flat(values).items() if values else ():
        items = value if isinstance(value, list) else [value]
        yield key, ", ".join(numbers.DASH if item is None else str(item) for item in items)
