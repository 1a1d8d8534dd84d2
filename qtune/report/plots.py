"""The charts of the page: loss, small multiples over the steps, and memory as planned and as measured.

Each is drawn for a given width in CSS pixels, so that its text is as large on a telephone as on a wide screen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qtune.report import numbers
from qtune.report.svg import COLOURS, new_figure, settings, to_svg

# a loss that falls further than by this factor is easier to read on a logarithmic axis
LOG_FROM = 8.0

# how the parts of the plan are shaded: the base in grey, what is trained in colour, what a batch takes in a light tint
SHADES = {
    "weights": ("soft", 0.85),
    "temporary": ("soft", 0.35),
    "adapter": ("accent", 1.0),
    "gradients": ("accent", 0.8),
    "optimizer": ("accent", 0.62),
    "activations": ("accent", 0.4),
    "logits": ("accent", 0.22),
}
OTHER_SHADE = ("soft", 0.2)


@dataclass(frozen=True)
class Series:
    """Values at their steps."""

    steps: Sequence[int]
    values: Sequence[float]


def smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """The centred moving average of the values, and over how many it goes; narrower at both ends."""
    reach = len(values) // 30
    means = [
        float(np.mean(values[max(0, at - reach) : at + reach + 1])) for at in range(len(values))
    ]
    return means, 2 * reach + 1


def loss_chart(name: str, width: int, training: Series, held_out: Series) -> Markup:
    """Training loss, each step light and their moving average strong, with the held-out losses as points."""
    with settings(name):
        figure = new_figure(width, 300 if width > 500 else 240)
        axes = figure.add_subplot()
        means, reach = smoothed(training.values)
        if training.steps:
            light = 0.4 if reach > 1 else 1.0
            axes.plot(training.steps, training.values, color=COLOURS["accent"], alpha=light, lw=1)
            axes.plot(training.steps, means, color=COLOURS["accent"], lw=2)
        if held_out.steps:
            _points(axes, held_out)
        _scale(axes, [*means, *held_out.values])
        _style(axes, "step")
        return to_svg(figure, name, _loss_label(training, held_out))


def small_chart(name: str, width: int, series: Series, what: str) -> Markup:
    """One figure of the training over its steps, from zero up."""
    with settings(name):
        figure = new_figure(width, 170)
        axes = figure.add_subplot()
        axes.plot(series.steps, series.values, color=COLOURS["accent"], lw=1.5)
        axes.set_ylim(0, max(series.values) * 1.08 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        _style(axes, "step")
        low, high = min(series.values), max(series.values)
        label = f"{what} over {len(series.steps)} steps, between {low:.3g} and {high:.3g}"
        return to_svg(figure, name, label)


def memory_chart(name: str, width: int, parts: dict[str, int], peak: int | None) -> Markup:
    """The planned bytes as one stacked bar, above the measured peak to the same scale."""
    with settings(name):
        figure = new_figure(width, 56 if peak is None else 96)
        axes = figure.add_subplot()
        start = 0.0
        for part, size in parts.items():
            role, strength = SHADES.get(part, OTHER_SHADE)
            axes.barh(0, size / 2**30, left=start, color=COLOURS[role], alpha=strength, height=0.7)
            start += size / 2**30
        if peak is not None:
            axes.barh(1, peak / 2**30, color=COLOURS["ink"], height=0.7)
        rows = ["plan"] if peak is None else ["plan", "measured"]
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g} GiB"))
        _bare(axes)
        return to_svg(figure, name, _memory_label(parts, peak))


def _points(axes: Axes, held_out: Series) -> None:
    axes.plot(
        held_out.steps,
        held_out.values,
        color=COLOURS["ink"],
        lw=0,
        marker="o",
        markersize=7,
        markeredgecolor=COLOURS["paper"],
        markeredgewidth=1.5,
        clip_on=False,
        zorder=5,
    )


def _scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis for losses that fall far; from zero up otherwise."""
    low, high = min(values := list(values)), max(values)
    if low <= 0 or high / low < LOG_FROM:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _style(axes: Axes, x_label: str) -> None:
    axes.grid(axis="y", lw=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(x_label)
    axes.margins(x=0.01)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.patch.set_visible(False)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.grid(axis="x", lw=1)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tick(value: float, _: int) -> str:
    """A tick in as few characters as it takes."""
    if value >= 1e4:
        return f"{value / 1e3:,.0f}k"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def _loss_label(training: Series, held_out: Series) -> str:
    words = []
    for what, series in (("Training loss", training), ("Held-out loss", held_out)):
        if series.steps:
            words.append(
                f"{what} from {series.values[0]:.3g} at step {series.steps[0]} "
                f"to {series.values[-1]:.3g} at step {series.steps[-1]}"
            )
    return ". ".join(words)


def _memory_label(parts: dict[str, int], peak: int | None) -> str:
    planned = f"Planned {numbers.memory(sum(parts.values()))}"
    measured = "" if peak is None else f", measured peak {numbers.memory(peak)}"
    each = ", ".join(f"{name} {numbers.memory(size)}" for name, size in parts.items())
    return f"{planned}{measured}. {each}"
