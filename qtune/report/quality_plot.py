"""Quality against size: what each servable form of the model keeps of the tuning, over its bytes.

The height is recovery, where the run has it, and the held-out loss otherwise. Labels are put beside
their points and pushed apart where they would lie on each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qtune.report import numbers
from qtune.report.svg import COLOURS, TEXT_PX, new_figure, settings, to_svg

HEIGHT = 340
# pixels between a point and its label, and from one label's line to the next
GAP, LINE = 9, TEXT_PX + 3
# of a label's size: on average a letter is half as wide as high
LETTER = 0.55


@dataclass(frozen=True)
class Point:
    """A form of the model: megabytes, quality and half its 95 % interval."""

    name: str
    size_mb: float
    quality: float
    half: float | None
    exact: bool


def quality_chart(name: str, width: int, points: Sequence[Point], *, share: bool) -> Markup:
    """The points with their labels; `share` says that quality is recovery and no loss."""
    with settings(name):
        figure = new_figure(width, HEIGHT)
        axes = figure.add_subplot()
        if share:
            axes.axhline(1, color=COLOURS["soft"], lw=1, ls=(0, (4, 3)))
        for point in points:
            _draw(axes, point)
        _axes(axes, points, share)
        figure.draw_without_rendering()
        _labels(axes, points)
        return to_svg(figure, name, _label(points, share))


def _draw(axes: Axes, point: Point) -> None:
    """A full dot of what is exact, a ring of what is not, with its interval."""
    axes.errorbar(
        point.size_mb,
        point.quality,
        yerr=point.half,
        color=COLOURS["accent"],
        elinewidth=1.5,
        capsize=0,
        marker="o",
        markersize=8,
        markerfacecolor=COLOURS["accent" if point.exact else "paper"],
        markeredgecolor=COLOURS["accent"],
        markeredgewidth=1.5,
        zorder=3,
    )


def _axes(axes: Axes, points: Sequence[Point], share: bool) -> None:
    axes.set_xlim(0, 1.08 * max(point.size_mb for point in points))
    ends = [p.quality + sign * (p.half or 0) for p in points for sign in (-1, 1)] + [1.0] * share
    room = 0.12 * (max(ends) - min(ends)) or 0.01
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("MB")
    axes.grid(axis="y", lw=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names, those of the right half to the left of their points, none over another."""
    left, right = axes.get_window_extent().intervalx
    placed: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: -point.quality):
        x, y = axes.transData.transform((point.size_mb, point.quality))
        length = len(point.name) * TEXT_PX * LETTER
        leftward = x + GAP + length > right and x - GAP - length > left
        start = x - GAP - length if leftward else x + GAP
        level = _free_level(placed, start, start + length, y)
        placed.append((start, start + length, level))
        label = axes.annotate(
            point.name,
            (point.size_mb, point.quality),
            xytext=(-GAP if leftward else GAP, level - y),
            textcoords="offset pixels",
            ha="right" if leftward else "left",
            va="center",
            # no line behind a name
            bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1},
            zorder=2,
            arrowprops={"arrowstyle": "-", "color": COLOURS["line"], "shrinkA": 0, "shrinkB": 4}
            if abs(level - y) > LINE / 2
            else None,
        )
        # it must not move the points it stands beside
        label.set_in_layout(False)


def _free_level(
    placed: Sequence[tuple[float, float, float]], start: float, end: float, level: float
) -> float:
    """The height nearest below `level` where a label from start to end lies on no other."""
    while True:
        over = [y for a, b, y in placed if a < end and start < b and abs(y - level) < LINE]
        if not over:
            return level
        level = min(over) - LINE


def _label(points: Sequence[Point], share: bool) -> str:
    what = "Recovery" if share else "Held-out loss"
    each = ", ".join(f"{p.name} {_said(p, share)} at {p.size_mb:,.0f} MB" for p in points)
    return f"{what} over size. {each}"


def _said(point: Point, share: bool) -> str:
    said = numbers.percent(point.quality, 1) if share else numbers.decimal(point.quality)
    return f"{said}, exact," if point.exact else said
