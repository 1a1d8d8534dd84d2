"""The file of `qtune sense`: what each layer loses in each format, as JSON lines.

The first line says what was measured: model, text, method. Every other is one layer in one format
and is written as it is found, so an interrupted measurement goes on where it was. `qtune plan`
reads the file and needs neither the model nor the text.

What a single layer changes is less than what the text's few rows tell apart; what all of them
change together is not. So the changes of all layers in a format are added up and shared out again
by what each layer loses of its output (`shared_losses`).
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtune.errors import UserError


@dataclass(frozen=True)
class Sensitivity:
    """One layer in one format, all others in 16 bits."""

    layer: str
    format: str
    num_weights: int
    size_bytes: int
    """Of codes, scales and zero points."""
    output_error: float
    """tr(E H E^T) / tr(W H W^T): what the layer's output loses, relative, on the text."""
    loss_change: float
    """By how much the model's loss changes on the text, in nats a token."""
    standard_error: float
    """Of the change, over rows of the text."""


def shared_losses(found: Sequence[Sensitivity]) -> dict[tuple[str, str], float]:
    """What each layer (name, format) is taken to lose, in nats a token, from 0 on.

    What makes numbers overflow is left out.
    """
    changes: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    finite = [it for it in found if math.isfinite(it.loss_change + it.output_error)]
    for it in finite:
        changes[it.format] += it.loss_change
        errors[it.format] += it.output_error
    each = {name: max(changes[name], 0.0) / (errors[name] or 1.0) for name in changes}
    return {(it.layer, it.format): each[it.format] * it.output_error for it in finite}


@dataclass(frozen=True)
class Header:
    """What was measured; another header is another measurement."""

    model: str
    method: str
    rotate: bool
    group_size: int | str
    dtype: str
    """What the model computed in; 16 bits cannot tell the small changes of a single layer."""
    text: str
    text_sha256: str
    tokens: int
    loss: float = field(compare=False)
    """Of the 16-bit model on the text, in nats a token."""


@dataclass
class SenseFile:
    """A file of sensitivities: all that it holds, and where the next one goes."""

    path: Path
    header: Header
    found: list[Sensitivity]

    @property
    def known(self) -> set[tuple[str, str]]:
        """Layers and formats that are measured."""
        return {(it.layer, it.format) for it in self.found}

    def add(self, sensitivity: Sensitivity) -> None:
        """Append one line to the file."""
        self.found.append(sensitivity)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(sensitivity))


def start(path: Path, header: Header) -> SenseFile:
    """The file of this measurement, begun or as far as it got.

    Raises UserError where it holds another measurement.
    """
    if path.exists():
        found = read(path)
        if found.header != header:
            raise UserError(
                f"{path} holds another measurement ({_differences(found.header, header)}); "
                "remove it, or name another with --out"
            )
        # without a last line that was cut off
        path.write_text("".join(map(_line, (header, *found.found))), encoding="utf-8")
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_line(header), encoding="utf-8")
    return SenseFile(path, header, [])


def read(path: Path) -> SenseFile:
    """The file as far as it is written; UserError: there is none, or it is something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `qtune sense MODEL --out {path}` writes it")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        header = Header(**json.loads(lines[0]))
        return SenseFile(path, header, list(_sensitivities(lines[1:])))
    except (IndexError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of qtune sense ({error}); remove it and measure again"
        ) from error


def _sensitivities(lines: list[str]) -> Iterator[Sensitivity]:
    for line in lines:
        # an interruption may have cut the last one off
        if line.endswith("\n"):
            yield Sensitivity(**json.loads(line))


def _line(value: Any) -> str:
    return json.dumps(asdict(value)) + "\n"


def _differences(before: Header, now: Header) -> str:
    old, new = asdict(before), asdict(now)
    keys = [key for key in old if key != "loss" and old[key] != new[key]]
    return ", ".join(f"{key}: {old[key]}, not {new[key]}" for key in keys)
