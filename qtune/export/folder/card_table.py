"""The results in a model card: this export beside the trained model and the base."""

from typing import Any

from rich.filesize import decimal

_HEADINGS = (
    "model", "loss", "more than trained", "perplexity", "KL", "top-1", "gain kept", "score", "size",
)  # fmt: skip
_NAMES = {"this": "**this export**", "trained": "trained model", "base": "base"}


def results(manifest: dict[str, Any]) -> str:
    """Markdown with the rows of this export, the trained model and the base; scores of tasks."""
    rows = [row for row in (manifest["results"] or {}).values() if row]
    if not rows:
        return "## Results\n\nThis export was not measured."
    lines = [_line(_HEADINGS), _line(["---"] + ["---:"] * (len(_HEADINGS) - 1))]
    for which, row in manifest["results"].items():
        if row:
            lines.append(_line(_cells(_NAMES[which], row)))
    tokens, answers = (max(row[key] for row in rows) for key in ("tokens", "answers"))
    metric = next((row["metric"] for row in rows if row.get("metric")), "exact_match")
    asked = f" Score: {metric} of {answers} answers." if answers else ""
    legend = (
        f"Loss in nats on {tokens} held-out tokens; for each of them KL from the trained model "
        "and how often the best token is the same (top-1). Gain kept: the share of what training "
        f"won over the quantized base.{asked} Intervals are those of 95 %."
    )
    parts = ["## Results", "\n".join(lines), legend, _tasks(manifest["results"])]
    return "\n\n".join(part for part in parts if part)


def _tasks(rows: dict[str, Any]) -> str:
    """A table with the score of each task; empty where there are none."""
    scores = {
        which: {(score["task"], score["metric"]): score for score in (row or {}).get("tasks", [])}
        for which, row in rows.items()
    }
    lines = [
        _line([task, metric, *(_score(scores[which].get((task, metric))) for which in rows)])
        for task, metric in scores["this"]
    ]
    head = _line(["task", "metric", *(_NAMES[which] for which in rows)])
    return "\n".join([head, _line(["---", "---"] + ["---:"] * len(rows)), *lines]) if lines else ""


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    error = score["standard_error"]
    return f"{score['value']:.4f}" + (f" ± {1.96 * error:.4f}" if error else "")


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    interval, right = row.get("interval"), _share(row.get("exact_match"))
    if right and interval:
        right += f" ({interval[0]:.1%} to {interval[1]:.1%})"
    nats, error = row.get("nats"), row.get("standard_error")
    more = "" if nats is None else f"{nats:+.4f}"
    return [
        name,
        _number(row["loss"], 4),
        f"{more} ± {1.96 * error:.4f}" if more and error else more,
        _number(row["perplexity"], 3),
        _number(row.get("kl"), 4),
        _share(row.get("top1")),
        _share(row.get("recovery")),
        right,
        decimal(row["size_bytes"]),
    ]


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
