"""The plot of `qtune compare`: what is lost against bits, of the quantized layers and of the model.

A loss axis in nats: linear below a hundredth, logarithmic above, so that 8 bits and 2 bits are both
to be seen. Bars are two standard errors.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtune.comparing.comparison import Line

LINEAR_TO = 0.01
MARKERS = "osD^vPX*"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Write the plot as a PNG."""
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    series = _series(lines)
    for axes, of_model, title in ((left, False, "quantized layers"), (right, True, "whole model")):
        for marker, (method, members) in zip(_markers(len(series)), series.items(), strict=True):
            _draw(axes, members, of_model, marker, method)
        axes.set_xlabel(f"bits of a weight, {title}")
        axes.set_yscale("symlog", linthresh=LINEAR_TO)
        axes.axhline(0, color="0.5", lw=1)
        axes.grid(axis="y", lw=0.5)
    left.set_ylabel("nats a token lost against 16 bits")
    right.legend(frameon=False)
    figure.savefig(path)


def _series(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Quantized forms by how they were made."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.bits < 16 and line.nats == line.nats:
            format_name = line.name.split()[0]
            found[line.name.removeprefix(format_name).strip() or "nearest"].append(line)
    return found


def _markers(count: int) -> list[str]:
    return [MARKERS[number % len(MARKERS)] for number in range(count)]


def _draw(axes: Axes, lines: Sequence[Line], of_model: bool, marker: str, method: str) -> None:
    bits = [line.model_bits if of_model else line.bits for line in lines]
    nats = [line.nats for line in lines]
    errors = [2 * line.standard_error for line in lines]
    axes.errorbar(bits, nats, errors, fmt=marker, capsize=3, label=method)
    for line, x, y in zip(lines, bits, nats, strict=True):
        word = line.name.split()[0]
        axes.annotate(word, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
