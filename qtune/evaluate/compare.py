"""The table of a run as eval.json.

JSON has no infinity: a figure that is not finite is written as null; one that every row has comes
back as NaN. Files of earlier releases lack what was not measured then.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.evaluate.long_context import CacheEffect
from qtune.evaluate.table import Kind, Merge, Row, Table, make_row
from qtune.evaluate.table_print import print_table
from qtune.evaluate.task_score import TaskScore
from qtune.evaluate.text_perplexity import TextLikelihood
from qtune.files import write_text

__all__ = ["Kind", "Merge", "Row", "Table", "make_row", "print_table", "read", "write"]


def write(table: Table, path: Path) -> None:
    """Write eval.json, all or nothing."""
    content = _finite_or_none(dataclasses.asdict(table))
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read(path: Path) -> Table:
    """The table in eval.json. UserError: the file is missing or not what `write` writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(row) for row in content["rows"]]
        merge = None if content["merge"] is None else Merge(**content["merge"])
        effect = content.get("kv_cache") and CacheEffect(**content["kv_cache"])
        return Table(content["trained"], rows, merge, effect)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `qtune eval {path.parent}` writes it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not a table of qtune ({error}); remove it and run `qtune eval {path.parent}`"
        ) from error


def _row(values: dict[str, Any]) -> Row:
    """A row of the file, its lists and objects made what they were."""
    # what every row has is null only where it was not finite
    known = values | {key: math.nan for key in ("loss", "perplexity") if values[key] is None}
    if known.get("text"):
        known["text"] = TextLikelihood(**known["text"])
    known["tasks"] = tuple(TaskScore(**_with_tuple(score)) for score in known.get("tasks", ()))
    return Row(**_with_tuple(known))


def _with_tuple(values: dict[str, Any]) -> dict[str, Any]:
    ends = values.get("interval")
    return values if ends is None else values | {"interval": tuple(ends)}


def _finite_or_none(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite_or_none(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite_or_none(inner) for inner in value]
    return value
