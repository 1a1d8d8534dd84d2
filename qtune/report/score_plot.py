"""Scores of one task by all models, as points with their 95 % intervals, one below the other."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qtune.report.svg import COLOURS, new_figure, settings, to_svg

ROW_HEIGHT, EDGES = 22, 46


@dataclass(frozen=True)
class Bar:
    """A model's score and its 95 % interval; `trained` is the one others are compared with."""

    name: str
    value: float
    interval: tuple[float, float] | None
    trained: bool


def score_chart(name: str, width: int, bars: Sequence[Bar], what: str) -> Markup:
    """The scores; shares are shown as percentages, over all or a part of the scale."""
    with settings(name):
        figure = new_figure(width, ROW_HEIGHT * len(bars) + EDGES)
        axes = figure.add_subplot()
        for at, bar in enumerate(bars):
            colour = COLOURS["ink" if bar.trained else "accent"]
            if bar.interval is not None:
                axes.plot(bar.interval, (at, at), color=colour, lw=1.5)
            axes.plot(bar.value, at, color=colour, marker="o", markersize=6)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if all(0 <= bar.value <= 1 for bar in bars):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.margins(x=0.08)
        axes.grid(axis="x", lw=1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        said = ", ".join(f"{bar.name} {bar.value:.3g}" for bar in bars)
        return to_svg(figure, name, f"{what}: {said}")
