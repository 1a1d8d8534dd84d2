"""The file of `qtune sense`: what each layer loses in each format, as JSON lines.

The first line says what was measured: model, text, method. Every other is one layer in one format
and is written as it is found, so an interrupted measurement goes on where it was. `qtune plan`
reads the file and needs neither the model nor the text.

What layers lose is taken to add up: errors of different layers have little to do with each other,
and docs/quality.md has how near the sum comes to what a whole model loses.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtune.errors import UserError
from qtune.recipe_quant import FormatName, GroupSize, MethodName

# raised when other things are measured: figures of one version are no figures of another
VERSION = 2


@dataclass(frozen=True)
class Sensitivity:
    """One layer in one format, all others in 16 bits."""

    layer: str
    format: FormatName
    num_weights: int
    size_bytes: int
    """Of codes, scales and zero points."""
    output_error: float
    """tr(E H E^T) / tr(W H W^T): what the layer's output loses, relative, on the text."""
    divergence: float
    """By how far the model's predictions move from the 16-bit ones: KL, in nats a token."""
    standard_error: float
    """Of the divergence, over rows of the text."""


@dataclass(frozen=True)
class Header:
    """What was measured; another header is another measurement."""

    model: str
    method: MethodName
    rotate: bool
    group_size: GroupSize
    text: str
    text_sha256: str
    tokens: int
    loss: float = field(compare=False)
    """Of the 16-bit model on the text, in nats a token."""
    version: int = VERSION


@dataclass
class SenseFile:
    """A file of sensitivities: all that it holds, and where the next one goes."""

    path: Path
    header: Header
    found: list[Sensitivity]

    @property
    def known(self) -> set[tuple[str, FormatName]]:
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
        header = _header(dict(json.loads(lines[0])))
        return SenseFile(path, header, list(_sensitivities(lines[1:])))
    except (IndexError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of qtune sense ({error}); remove it and measure again"
        ) from error


def _header(fields: dict[str, Any]) -> Header:
    version = fields.get("version", 1)
    if version != VERSION:
        raise ValueError(f"version {version}, not {VERSION}")
    return Header(**fields)


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
