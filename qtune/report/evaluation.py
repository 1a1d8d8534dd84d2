"""What eval.json says, laid out for the page: all rows, scores, fields and charts."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from qtune.evaluate.intervals import Z, wilson_interval
from qtune.evaluate.table_print import METRICS
from qtune.evaluate.text_perplexity import TextLikelihood
from qtune.report import numbers
from qtune.report.files import Files
from qtune.report.quality_plot import Point, quality_chart
from qtune.report.score_plot import Bar, score_chart

Row = dict[str, Any]

# a difference that is less likely by chance is marked
SIGNIFICANT = 0.05


def rows(files: Files) -> list[Row]:
    """Rows of the evaluation, those with a score with the 95 % interval of it."""
    return [row | {"interval": _interval(row), "change": _change(row)} for row in _measured(files)]


def tokens(files: Files) -> list[int]:
    """Numbers of tokens the rows' losses are over: one where all rows saw the same."""
    return sorted({row["tokens"] for row in _measured(files)})


def score_title(files: Files) -> str:
    """What the score of answers is called."""
    found = {row["metric"] or "exact_match" for row in _measured(files) if row["answers"]}
    name = METRICS[found.pop()] if len(found) == 1 else "score" if found else "exact match"
    return f"{name[0].upper()}{name[1:]}"


def suite(files: Files) -> dict[str, Any]:
    """Titles of the columns, and rows of name and cells, for tasks and text; empty without any."""
    measured = _measured(files)
    keys = dict.fromkeys((s["task"], s["metric"]) for row in measured for s in row["tasks"])
    texts = [TextLikelihood(**row["text"]) if row["text"] else None for row in measured]
    if not keys and not any(texts):
        return {}
    titles = ["Bits per byte", "Word perplexity"] if any(texts) else []
    titles += [f"{task}, {metric.replace('_', ' ')}" for task, metric in keys]
    table = []
    for row, text in zip(measured, texts, strict=True):
        cells = [_text_cells(text)] if any(texts) else []
        cells.append([_task_cell(_score(row, *key)) for key in keys])
        table.append((row["name"], [cell for part in cells for cell in part]))
    text = next(filter(None, texts), None)
    return {"titles": titles, "rows": table, "text": text}


def field_table(files: Files) -> dict[str, Any]:
    """Names of JSON fields, and for each row its share of right answers; empty without any."""
    measured = [row for row in _measured(files) if row["fields"]]
    names = list(dict.fromkeys(name for row in measured for name in row["fields"]))
    cells = [(row["name"], [row["fields"].get(name) for name in names]) for row in measured]
    return {"names": names, "rows": cells} if names else {}


def quality_charts(files: Files, wide: int, narrow: int) -> dict[str, Any]:
    """The chart of quality over size in two widths, of two forms of the model or more."""
    gain = _gain(files)
    points = list(_points(files, gain))
    if len(points) < 2:
        return {}
    share = gain is not None
    charts = {
        key: quality_chart(f"quality-{key}", width, points, share=share)
        for key, width in (("wide", wide), ("narrow", narrow))
    }
    return charts | {"share": share}


def score_charts(files: Files, width: int) -> Iterator[tuple[str, Markup]]:
    """Title and chart of each score of a task that two models have or more."""
    measured = _measured(files)
    trained = files.evaluation and files.evaluation["trained"]
    keys = dict.fromkeys((s["task"], s["metric"]) for row in measured for s in row["tasks"])
    for number, (task, metric) in enumerate(keys):
        found = [(row["name"], _score(row, task, metric)) for row in measured]
        bars = [
            Bar(_short(name), score["value"], score["interval"], name == trained)
            for name, score in found
            if score is not None
        ]
        title = f"{task}, {metric.replace('_', ' ')}"
        if len(bars) > 1:
            yield title, score_chart(f"score-{number}", width, bars, title)


def _measured(files: Files) -> list[Row]:
    return files.evaluation["rows"] if files.evaluation else []


def _interval(row: Row) -> list[float] | tuple[float, float] | None:
    """Files of earlier releases have none, and only scores of right and wrong."""
    if not row["answers"]:
        return None
    right = round(row["exact_match"] * row["answers"])
    return row["interval"] or wilson_interval(right, row["answers"])


def _change(row: Row) -> str:
    """The difference of the loss from the trained model's, with its standard error."""
    if row["nats"] is None:
        return ""
    error = row["standard_error"]
    return f"{row['nats']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _text_cells(text: TextLikelihood | None) -> list[str]:
    if text is None:
        return [numbers.DASH] * 2
    return [numbers.decimal(text.bits_per_byte), numbers.decimal(text.word_perplexity, 2)]


def _score(row: Row, task: str, metric: str) -> dict[str, Any] | None:
    scores = (s for s in row["tasks"] if (s["task"], s["metric"]) == (task, metric))
    return next(scores, None)


def _task_cell(score: dict[str, Any] | None) -> str:
    """A score with its 95 % interval, marked where it differs from the trained model's."""
    if score is None:
        return numbers.DASH
    share = 0 <= score["value"] <= 1
    factor, unit = (100, f"{numbers.SPACE}%") if share else (1, "")
    interval = score["interval"]
    differs = score["p_value"] is not None and score["p_value"] < SIGNIFICANT
    ends = ""
    if interval is not None:
        low, high = (factor * end for end in interval)
        ends = f" ({low:.0f}{numbers.DASH}{high:.0f})"
    return f"{factor * score['value']:.1f}{unit}{ends}{' *' if differs else ''}"


def _half(standard_error: float | None) -> float | None:
    return None if standard_error is None else Z * standard_error


def _gain(files: Files) -> float | None:
    """Nats per token that the tuning took off the loss; None where rows have no recovery."""
    bases = {row["kind"]: row for row in reversed(_measured(files))}
    base = bases.get("quantized") or bases.get("base")
    trained = next((row for row in _measured(files) if row["recovery"] == 1), None)
    if base is None or trained is None:
        return None
    gain: float = base["loss"] - trained["loss"]
    return gain


def _points(files: Files, gain: float | None) -> Iterator[Point]:
    """The forms that can be served: tuned ones, without adapters that need a base beside them."""
    adapters = {export["folder"] for export in files.exports if export["form"] == "adapter"}
    for row in _measured(files):
        quality = row["loss"] if gain is None else row["recovery"]
        if row["kind"] in ("base", "quantized") or quality is None:
            continue
        if _short(row["name"]) in adapters:
            continue
        half = _half(row["standard_error"])
        yield Point(
            name=_short(row["name"]),
            size_mb=row["size_bytes"] / 1e6,
            quality=quality,
            half=half if half is None or gain is None else half / gain,
            exact=bool(row["exact"]) or row["kind"] == "adapter",
        )


def _short(name: str) -> str:
    return str(name).removeprefix("export ")
