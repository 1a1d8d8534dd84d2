"""The charts of the page: loss, small multiples, and memory as planned and as measured.

Each is drawn for a given width in CSS pixels, so that its text is as large on a telephone as on a
wide screen.
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
# more points than these in a line would be a band of ink: neighbours are drawn as their mean
LOSS_POINTS, SMALL_POINTS = 400, 150

# how parts of the plan are shaded: the base grey, what is trained in colour, a batch in light tints
SHADES = {
    "weights": ("soft", 0.85),
    "temporary": ("soft", 0.35),
    "adapter": ("accent", 1.0),
    "gradients": ("accent", 0.8),
    "optimizer": ("accent", 0.62),
    "activations": ("accent", 0.4),
    "backward": ("accent", 0.31),
    "logits": ("accent", 0.22),
}
OTHER_SHADE = ("soft", 0.2)


@dataclass(frozen=True)
class Series:
    """Values at their steps."""

    steps: Sequence[int]
    values: Sequence[float]


def smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """The centred moving average of the values, narrower at both ends; over how many it goes."""
    reach = len(values) // 30
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    means: list[float] = ((sums[last] - sums[first]) / (last - first)).tolist()
    return means, 2 * reach + 1


def binned(series: Series, most: int) -> tuple[Series, int]:
    """Means over groups of steps, at most that many, and the size of a group: 1 changes nothing."""
    size = max(1, -(-len(series.steps) // most))
    starts = range(0, len(series.steps), size)
    values = [float(np.mean(series.values[start : start + size])) for start in starts]
    return Series([series.steps[start] for start in starts], values), size


def loss_chart(name: str, width: int, training: Series, held_out: Series) -> Markup:
    """Training loss, its steps light and their mean strong, and held-out losses as points."""
    with settings(name):
        figure = new_figure(width, 300 if width > 500 else 240)
        axes = figure.add_subplot()
        means, reach = smoothed(training.values)
        if training.steps:
            shown, _ = binned(training, LOSS_POINTS)
            light = 0.5 if reach > 1 else 1.0
            axes.plot(shown.steps, shown.values, color=COLOURS["accent"], alpha=light, lw=1)
            axes.plot(training.steps, means, color=COLOURS["accent"], lw=2)
        if held_out.steps:
            _points(axes, held_out)
        _scale(axes, [*means, *held_out.values])
        _style(axes, "step")
        return to_svg(figure, name, _loss_label(training, held_out))


def small_chart(name: str, width: int, series: Series, what: str) -> Markup:
    """One figure of the training over its steps; zero is in sight."""
    with settings(name):
        figure = new_figure(width, 170)
        axes = figure.add_subplot()
        shown, _ = binned(series, SMALL_POINTS)
        axes.plot(shown.steps, shown.values, color=COLOURS["accent"], lw=1.5)
        axes.set_ylim(min(0, *shown.values) * 1.08, max(0, *shown.values) * 1.08 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
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
        # behind the tints, so that the grid does not show through
        axes.barh(0, sum(parts.values()) / 2**30, color=COLOURS["paper"], height=0.7)
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
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
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
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(x_label)
    axes.margins(x=0.01)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.grid(axis="x", lw=1)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tick(value: float, _: int) -> str:
    """A tick in as few characters as it takes."""
    if value >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < value < 0.01:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:g}"


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
