"""The table of `qtune compare`: compare.json, and the same as Markdown.

Rows are written as they are measured and found again by name and settings, so an interrupted or
extended comparison measures only what is new. Rows of other data or another model are refused.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.files import write_text

COLUMNS = ("form", "bits", "of model", "MB", "perplexity", "nats lost", "KL", "top-1", "correct")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One form of the base model and what was measured of it, against the 16-bit form."""

    name: str
    method: str
    settings: str
    """All that decides its weights; another text is another form."""
    bits: float
    """Of a weight in the quantized layers, scales included."""
    model_bits: float
    """Of a weight in the whole model, without an adapter."""
    size_bytes: int
    adapter_bytes: int
    loss: float
    perplexity: float
    nats: float
    """By how much the loss is higher, a token, paired by samples."""
    standard_error: float
    kl: float | None
    top1: float | None
    exact_match: float | None
    answers: int
    seconds: float
    """What making and measuring it took."""


@dataclass
class Comparison:
    """Lines by name, and what they were measured on: model, data, numbers of rows."""

    measured_on: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    def find(self, name: str, settings: str) -> Line | None:
        """The line of that form, if it has been measured."""
        found = (it for it in self.lines if (it.name, it.settings) == (name, settings))
        return next(found, None)

    def put(self, line: Line) -> None:
        """Add a line, in the place of one of its name."""
        self.lines = [it for it in self.lines if it.name != line.name] + [line]
        self.lines.sort(key=lambda it: (-it.bits, it.nats))


def read(path: Path, measured_on: dict[str, Any]) -> Comparison:
    """The comparison in compare.json, or an empty one; UserError: it is of something else."""
    if not path.exists():
        return Comparison(measured_on)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Comparison(content["measured_on"], [_line(row) for row in content["lines"]])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a table of qtune compare ({error}); remove it") from error
    if found.measured_on != measured_on:
        keys = [k for k in measured_on if found.measured_on.get(k) != measured_on[k]]
        raise UserError(
            f"{path} compares on something else ({', '.join(keys)} differ); remove it, or name "
            "another folder with --out"
        )
    return found


def write(comparison: Comparison, path: Path) -> None:
    """Write compare.json, all or nothing; what is not finite becomes null."""
    lines = [{k: _finite(v) for k, v in asdict(it).items()} for it in comparison.lines]
    content = {"measured_on": comparison.measured_on, "lines": lines}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def cells(line: Line) -> list[str]:
    """What the table shows of a line, column by column."""
    lost = f"{line.nats:+.4f} ± {line.standard_error:.4f}"
    large = not line.perplexity < 1e5
    return [
        line.name,
        f"{line.bits:.2f}",
        f"{line.model_bits:.2f}",
        f"{(line.size_bytes + line.adapter_bytes) / 1e6:.1f}",
        f"{line.perplexity:.1e}" if large else f"{line.perplexity:.2f}",
        "-" if line.bits == 16 else lost,
        "-" if line.kl is None else f"{line.kl:.4f}",
        "-" if line.top1 is None else f"{line.top1:.1%}",
        "-" if line.exact_match is None else f"{line.exact_match:.0%} of {line.answers}",
    ]


def markdown(lines: Sequence[Line]) -> str:
    """The table as Markdown."""
    rows = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _line(row: dict[str, Any]) -> Line:
    """Figures that every line has are null only where they were not finite."""
    always = ("loss", "perplexity", "nats", "standard_error")
    return Line(**row | {key: math.nan for key in always if row[key] is None})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
