"""Where conversations come from: a file, a hub data set or the demo, by the form of one string.

    demo:train, demo:train?rows=500      made by `demo.py`
    train.jsonl, train.json, x.parquet   a local file
    org/name, org/name:split             a data set on the Hugging Face hub

An unreachable hub is found out with one short request first: the `datasets` library would retry for
minutes. A recipe without a validation set gets one by `split_off`.
"""

import os
import random
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from qtune.data import demo, files
from qtune.data.rows import Problems, Row, checked_row
from qtune.errors import UserError

__all__ = ["Row", "load", "split_off"]

HUB_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>[\w.-]+(\[[\d:%-]+\])?))?")


def load(source: str) -> list[Row]:
    """Every row of a source, checked.

    Raises UserError with up to ten mistakes, each with its file and line.
    """
    problems = Problems()
    rows = [checked_row(source, number, row, problems) for number, row in _open(source, problems)]
    problems.raise_if_any()
    found = [row for row in rows if row is not None]
    if not found:
        raise UserError(f"{source}: holds no rows")
    return found


def split_off(rows: list[Row], share: float = 0.05, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, held out): a fixed random share of the rows, at least one, set aside in file order.

    Raises UserError where there are not two rows to divide.
    """
    if len(rows) < 2:
        raise UserError(
            f"{rows[0].source if rows else 'the data'}: a single row cannot be divided into "
            "training and validation; add rows, or name data.validation"
        )
    draw = random.Random(f"held out {seed}").random
    ranked = sorted((draw(), i) for i in range(len(rows)))
    aside = {i for _, i in ranked[: max(1, round(share * len(rows)))]}
    train = [row for i, row in enumerate(rows) if i not in aside]
    return train, [row for i, row in enumerate(rows) if i in aside]


def _open(source: str, problems: Problems) -> Iterable[tuple[int, Any]]:
    """(number, unchecked value) of every row."""
    if source.startswith("demo:"):
        return enumerate(_demo(source), start=1)
    path = Path(source).expanduser()
    hub = _HUB_ID.fullmatch(source)
    if path.exists() or path.suffix in files.READERS or hub is None:
        return files.read(path, problems)
    return enumerate(_hub(source, hub["name"], hub["split"] or "train"), start=1)


def _demo(source: str) -> list[dict[str, Any]]:
    name, _, query = source.removeprefix("demo:").partition("?")
    if name not in demo.SIZES:
        raise UserError(
            f"{source}: no such split; use {', '.join(f'demo:{s}' for s in demo.SIZES)}"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in ("rows", "seed") or not value.isdecimal() or (value == "0" and key == "rows"):
            raise UserError(
                f"{source}: '{key}={value}' is not an option; write ?rows=500 or ?seed=1"
            )
    count = int(options["rows"]) if "rows" in options else None
    return demo.rows(name, count, int(options.get("seed", 0)))


def _hub(source: str, name: str, split: str) -> Iterable[Any]:
    _ask_hub(source)
    # Imported here: seconds that files and the demo do not need.
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        rows: Iterable[Any] = load_dataset(name, split=split)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{source}: no such data set on the hub, or it needs a login (`hf auth login`), "
            "and no such local file"
        ) from error
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{source}: cannot be loaded from the hub: {error}") from error
    return rows


def _ask_hub(source: str) -> None:
    """Raise UserError unless the hub answers, with whatever status, within seconds."""
    if {os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_DATASETS_OFFLINE")} & {"1", "true"}:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise UserError(
            f"{source}: no such local file, and the hub {endpoint} cannot be reached ({error}); "
            "name a local file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
