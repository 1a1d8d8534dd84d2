"""The table of a run: every form of the model beside the others, as eval.json and on the terminal.

A row holds plain figures, so that the report and later tools need none of the code that measured
them. JSON has no infinity: a figure that is not finite is written as null and comes back as NaN.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as Grid

from qtune.errors import UserError
from qtune.evaluate.exact_match import Score, wilson_interval
from qtune.evaluate.generate import Answers
from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.perplexity import Likelihood
from qtune.files import write_text

Kind = Literal["base", "quantized", "adapter", "merged", "export"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of the model and what was measured of it.

    `tokens` are the supervised held-out tokens, `kl` is KL(trained || row) per token, `top1` the
    agreement with the trained model's likeliest token, `exact_match` a share of `answers`,
    `consumer` the library that loaded it, `exact` whether it is the trained model bit for bit.
    """

    name: str
    kind: Kind
    loss: float
    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None
    exact_match: float | None = None
    answers: int = 0
    size_bytes: int
    tokens_per_s: float | None = None
    consumer: str | None = None
    exact: bool | None = None


@dataclass(frozen=True)
class Merge:
    """Which weights the adapter was folded into, and why those."""

    chosen: Literal["original", "dequantized"]
    why: str


@dataclass
class Table:
    """The rows of a run; `trained` is the name of the one that the others are compared with."""

    trained: str
    rows: list[Row] = field(default_factory=list)
    merge: Merge | None = None
    kv_cache: CacheEffect | None = None


def make_row(
    name: str,
    kind: Kind,
    likelihood: Likelihood,
    *,
    size_bytes: int,
    score: Score | None = None,
    answers: Answers | None = None,
    consumer: str | None = None,
    exact: bool | None = None,
) -> Row:
    """The row of a model from what the other modules measured."""
    return Row(
        name=name,
        kind=kind,
        loss=likelihood.loss,
        perplexity=likelihood.perplexity,
        tokens=likelihood.tokens,
        kl=likelihood.kl,
        top1=likelihood.top1,
        exact_match=None if score is None else score.value,
        answers=0 if score is None else len(score.correct),
        size_bytes=size_bytes,
        tokens_per_s=None if answers is None else answers.tokens_per_s,
        consumer=consumer,
        exact=exact,
    )


def write(table: Table, path: Path) -> None:
    """Write eval.json, all or nothing."""
    content = dataclasses.asdict(table)
    content["rows"] = [
        {key: _finite_or_none(value) for key, value in row.items()} for row in content["rows"]
    ]
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read(path: Path) -> Table:
    """The table in eval.json. UserError: the file is missing or not what `write` writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**_with_nan(row)) for row in content["rows"]]
        merge = None if content["merge"] is None else Merge(**content["merge"])
        effect = content.get("kv_cache") and CacheEffect(**content["kv_cache"])
        return Table(content["trained"], rows, merge, effect)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `qtune eval {path.parent}` writes it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not a table of qtune ({error}); remove it and run `qtune eval {path.parent}`"
        ) from error


def print_table(console: Console, table: Table) -> None:
    """Show the table; without colours and lines where the console is no terminal."""
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    grid = Grid(box=lines, padding=(0, 1), pad_edge=False)
    grid.add_column("model")
    for heading in ("loss", "perplexity", "KL", "top-1", "exact match", "size", "tokens/s"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*_cells(row), style="bold" if row.name == table.trained else None)
    console.print(grid)
    console.print(_legend(table), style="dim", highlight=False, markup=False)
    if table.kv_cache is not None:
        console.print(_cache_line(table.kv_cache), style="dim", highlight=False, markup=False)


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.loss:.4f}",
        f"{row.perplexity:.3f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        "-" if row.top1 is None else f"{row.top1:.1%}",
        "-" if row.exact_match is None else _share(row.exact_match, row.answers),
        decimal(row.size_bytes),
        "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
    ]


def _share(share: float, num: int) -> str:
    low, high = wilson_interval(round(share * num), num)
    return f"{share:.1%} ({100 * low:.0f}-{100 * high:.0f})"


def _legend(table: Table) -> str:
    tokens = max((row.tokens for row in table.rows), default=0)
    answers = max((row.answers for row in table.rows), default=0)
    text = f"Loss on {tokens} held-out tokens; KL and top-1 per token, against {table.trained}"
    return text + (f"; exact match on {answers} answers, with its 95 % interval" if answers else "")


def _cache_line(effect: CacheEffect) -> str:
    return (
        f"Keys and values in {effect.bits} bits, {effect.context} tokens: "
        f"{decimal(effect.cache_bytes)} instead of {decimal(effect.cache_bytes_16bit)}, loss "
        f"{effect.loss:.4f} instead of {effect.loss_16bit:.4f}, KL {effect.kl:.4f}, "
        f"top-1 {effect.top1:.1%}"
    )


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Figures that every row has are null only where they were not finite."""
    return row | {key: math.nan for key in ("loss", "perplexity") if row[key] is None}
