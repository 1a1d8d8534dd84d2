"""The table of a run on the terminal: in as many columns as it has room for, never a figure cut.

What does not fit goes in the order of OPTIONAL; the report has everything.
"""

from collections.abc import Callable, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as Grid

from qtune.evaluate.intervals import wilson_interval
from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.table import Row, Table
from qtune.evaluate.task_score import TaskScore

Columns = dict[str, Callable[[Row], str]]

# longer names are broken between words
NAME_WIDTH = 20
# columns that go first where there is no room
OPTIONAL = ("ppl", "tok/s", "p", "top-1")
METRICS = {
    "exact_match": "exact match",
    "json_match": "JSON match",
    "json_fields": "JSON fields",
    "number_match": "number match",
    "contains": "contains",
}
# a difference that is less likely by chance is marked
SIGNIFICANT = 0.05


def print_table(console: Console, table: Table) -> None:
    """Show the table; without colours and lines where the console is no terminal."""
    columns = _columns(table.rows)
    for name in OPTIONAL:
        if not _fits(console, table.rows, columns):
            columns.pop(name, None)
    console.print(_grid(console, table, columns))
    notes = [_legend(table)]
    suites = _suite_columns(table.rows)
    while len(suites) > 1 and not _fits(console, table.rows, suites):
        suites.popitem()
    if suites:
        console.print(_grid(console, table, suites))
        notes.append(_suite_legend(table))
    if table.kv_cache is not None:
        notes.append(_cache_line(table.kv_cache))
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def score_name(rows: Sequence[Row]) -> str:
    """What the score of answers is called: as its metric, or `score` where rows have several."""
    found = {row.metric or "exact_match" for row in rows if row.answers}
    return METRICS[found.pop()] if len(found) == 1 else "score" if found else "exact match"


def _columns(rows: Sequence[Row]) -> Columns:
    """The columns that any of the rows has something in."""
    columns: Columns = {
        "loss": lambda row: f"{row.loss:.4f}",
        "change": _change,
        "recovery": lambda row: "-" if row.recovery is None else f"{row.recovery:.1%}",
        "ppl": _perplexity,
        "KL": lambda row: "-" if row.kl is None else f"{row.kl:.4f}",
        "top-1": lambda row: "-" if row.top1 is None else f"{row.top1:.1%}",
        score_name(rows): _score,
        "p": lambda row: "-" if row.p_value is None else _chance(row.p_value),
        "size": lambda row: decimal(row.size_bytes),
        "tok/s": lambda row: "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
    }
    return {name: cell for name, cell in columns.items() if any(cell(row) != "-" for row in rows)}


def _suite_columns(rows: Sequence[Row]) -> Columns:
    """A column for the text and for each score of a task, in the order of the rows' scores."""
    columns: Columns = {}
    if any(row.text for row in rows):
        columns["bits per byte"] = lambda row: f"{row.text.bits_per_byte:.4f}" if row.text else "-"
    for task, metric in dict.fromkeys((s.task, s.metric) for row in rows for s in row.tasks):
        columns[f"{task} {metric}"] = partial(_task, task=task, metric=metric)
    return columns


def _grid(console: Console, table: Table, columns: Columns) -> Grid:
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    grid = Grid(box=lines, padding=(0, 1), pad_edge=False)
    grid.add_column("model")
    for heading in columns:
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        cells = (cell(row) for cell in columns.values())
        grid.add_row(row.name, *cells, style="bold" if row.name == table.trained else None)
    return grid


def _fits(console: Console, rows: Sequence[Row], columns: Columns) -> bool:
    """Whether there is room for all figures, with names broken between words."""
    words = (len(word) for row in rows for word in row.name.split())
    longest = max((len(row.name) for row in rows), default=0)
    name = min(longest, max(NAME_WIDTH, *words)) if rows else 0
    widths = (
        max([len(heading), *(len(cell(row)) for row in rows)]) for heading, cell in columns.items()
    )
    # a terminal has lines between columns and around them
    gap, edges = (3, 2) if console.is_terminal else (2, 0)
    return name + sum(width + gap for width in widths) + edges <= console.width


def _change(row: Row) -> str:
    if row.nats is None:
        return "-"
    error = "" if row.standard_error is None else f" ±{row.standard_error:.4f}"
    return f"{row.nats:+.4f}{error}"


def _perplexity(row: Row) -> str:
    return f"{row.perplexity:.3f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}"


def _score(row: Row) -> str:
    if row.exact_match is None:
        return "-"
    ends = row.interval or wilson_interval(round(row.exact_match * row.answers), row.answers)
    return f"{row.exact_match:.1%} ({100 * ends[0]:.0f}-{100 * ends[1]:.0f})"


def _chance(p_value: float) -> str:
    return "<.001" if p_value < 0.001 else f"{p_value:.3f}"


def _task(row: Row, task: str, metric: str) -> str:
    score = next((s for s in row.tasks if (s.task, s.metric) == (task, metric)), None)
    return "-" if score is None else _task_score(score)


def _task_score(score: TaskScore) -> str:
    """The score with its 95 % interval, and a mark where it differs from the trained one's."""
    factor, unit = (100, "%") if 0 <= score.value <= 1 else (1, "")
    low, high = score.interval or (None, None)
    ends = "" if low is None or high is None else f" ({factor * low:.0f}-{factor * high:.0f})"
    mark = "*" if score.p_value is not None and score.p_value < SIGNIFICANT else ""
    return f"{factor * score.value:.1f}{unit}{ends}{mark}"


def _legend(table: Table) -> str:
    tokens = max((row.tokens for row in table.rows), default=0)
    answers = max((row.answers for row in table.rows), default=0)
    text = (
        f"Loss and perplexity (ppl) on {tokens} held-out tokens; change (± its standard error), KL "
        f"and top-1 against {table.trained}"
    )
    if any(row.recovery is not None for row in table.rows):
        text += "; recovery: share of the tuning's gain in loss that is kept"
    if answers:
        text += f"; {score_name(table.rows)} of {answers} answers with its 95 % interval"
    return text


def _suite_legend(table: Table) -> str:
    texts = {row.text.file for row in table.rows if row.text}
    words = [f"bits per byte of {name}" for name in sorted(texts)]
    if any(row.tasks for row in table.rows):
        words.append(f"tasks with their 95 % intervals; * differs from {table.trained}, p < 0.05")
    return "; ".join(words) + "; what does not fit here is in report.html"


def _cache_line(effect: CacheEffect) -> str:
    return (
        f"Keys and values in {effect.bits} bits, {effect.context} tokens: "
        f"{decimal(effect.cache_bytes)} instead of {decimal(effect.cache_bytes_16bit)}, loss "
        f"{effect.loss:.4f} instead of {effect.loss_16bit:.4f}, KL {effect.kl:.4f}, "
        f"top-1 {effect.top1:.1%}"
    )
