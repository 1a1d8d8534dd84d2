"""The adapter's change beside the error of quantization, through the blocks of one kind of layer.

Where the change lies below the error, quantizing merged weights again rounds most of it away.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qtune.report import numbers
from qtune.report.svg import COLOURS, new_figure, settings, to_svg

HEIGHT = 150
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Kind:
    """The layers of one kind: figures of each block, and the mean share a second grid keeps."""

    name: str
    blocks: list[int]
    changes: list[float]
    errors: list[float]
    share: float


def kinds(layers: Sequence[dict[str, Any]]) -> list[Kind]:
    """The layers of merge.json by the last part of their names; several in a block are averaged."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        number = _NUMBER.search(layer["layer"])
        found[layer["layer"].rpartition(".")[2]][int(number[1]) if number else 0].append(layer)
    return [_kind(name, blocks) for name, blocks in found.items()]


def merge_chart(name: str, width: int, kind: Kind, limits: tuple[float, float]) -> Markup:
    """Both figures relative to the weights, on the logarithmic scale that all kinds share."""
    with settings(name):
        figure = new_figure(width, HEIGHT)
        axes = figure.add_subplot()
        for values, role in ((kind.errors, "soft"), (kind.changes, "accent")):
            axes.plot(kind.blocks, values, color=COLOURS[role], lw=1.5, marker="o", markersize=3)
        axes.set_yscale("log")
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(LogLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("block")
        axes.grid(axis="y", lw=1)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        return to_svg(figure, name, _label(kind))


def limits(found: Sequence[Kind]) -> tuple[float, float]:
    """The ends of a scale that holds all figures, at powers of ten or halves of them."""
    values = [value for kind in found for value in (*kind.changes, *kind.errors) if value > 0]
    return (min(values) / 1.5, max(values) * 1.5) if values else (0.01, 1.0)


def _kind(name: str, blocks: dict[int, list[dict[str, Any]]]) -> Kind:
    numbers_of = sorted(blocks)

    def means(key: str) -> list[float]:
        return [_mean([layer[key] for layer in blocks[number]]) for number in numbers_of]

    return Kind(
        name, numbers_of, means("change_ratio"), means("error_ratio"), _mean(means("share"))
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _label(kind: Kind) -> str:
    change, error = (numbers.percent(_mean(v), 2) for v in (kind.changes, kind.errors))
    return f"{kind.name}: the adapter changes weights by {change}, quantization by {error}, on mean"
