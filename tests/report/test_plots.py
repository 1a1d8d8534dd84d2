import math
import re
from xml.etree import ElementTree

import pytest

from qtune.report import plots
from qtune.report.numbers import SPACE
from qtune.report.plots import Series

NONE = Series([], [])
FALLING = Series(range(1, 101), [2.6 * math.exp(-step / 20) + 0.02 for step in range(1, 101)])
FLAT = Series(range(1, 101), [2.0 - step / 200 for step in range(1, 101)])


def texts(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(str(svg)).iter("text")]


def bar_widths(svg):
    """Widths of the bars in a memory chart, least first."""
    paths = [path.attrib for path in ElementTree.fromstring(str(svg)).iter("path")]
    # bars are closed and filled, unlike grid lines and the frame
    bars = [path["d"] for path in paths if "z" in path["d"] and "fill: var" in path["style"]]
    corners = [re.findall(r"([\d.]+) [\d.]+", bar) for bar in bars]
    return sorted(max(map(float, x)) - min(map(float, x)) for x in corners)


def test_the_mean_is_centred_and_narrows_at_the_ends():
    means, reach = plots.smoothed([float(value) for value in range(60)])
    assert reach == 5
    assert [means[at] for at in (0, 1, 30, -1)] == pytest.approx([1, 1.5, 30, 58])
    assert plots.smoothed([3.0, 1.0]) == (pytest.approx([3.0, 1.0]), 1)
    assert plots.smoothed([]) == ([], 1)


def test_long_runs_are_drawn_as_means_of_neighbours():
    series = Series(range(1, 8), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 20.0])
    assert plots.binned(series, 7) == (Series(list(range(1, 8)), series.values), 1)
    assert plots.binned(series, 4) == (Series([1, 3, 5, 7], [2.0, 6.0, 10.0, 20.0]), 2)
    assert plots.binned(NONE, 4) == (NONE, 1)


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    assert {"0.05", "0.5", "1"} <= set(texts(plots.loss_chart("a", 800, FALLING, NONE)))
    ticks = texts(plots.loss_chart("a", 800, FLAT, NONE))
    assert {"0.0", "1.0"} <= set(ticks) or {"0", "1"} <= set(ticks)


def test_a_held_out_loss_is_a_point_each():
    held_out = Series([50, 100], [1.9, 1.7])
    with_points = str(plots.loss_chart("a", 800, FLAT, held_out))
    without = str(plots.loss_chart("a", 800, FLAT, NONE))

    def marks(svg):
        root = ElementTree.fromstring(svg)
        return [use for use in root.iter("use") if "var(--ink)" in use.attrib.get("style", "")]

    assert len(marks(with_points)) == 2 and not marks(without)
    assert "Held-out loss from 1.9 at step 50 to 1.7 at step 100" in with_points


@pytest.mark.parametrize("training", [NONE, Series([1], [2.0]), Series([1, 2], [0.0, 0.0])])
def test_short_and_odd_runs_can_be_drawn(training):
    svg = plots.loss_chart("a", 340, training, Series([2], [0.5]))
    assert "Held-out loss" in str(svg)
    if training.steps:
        assert "lr" in str(plots.small_chart("b", 330, training, "lr"))


def test_ticks_of_small_and_large_figures_are_exact():
    rates = texts(plots.small_chart("a", 330, Series([1, 2], [0.0, 2e-5]), "lr"))
    assert {"1e-5", "2e-5"} <= set(rates)
    speeds = texts(plots.small_chart("a", 330, Series([1, 2], [1.0, 30_000.0]), "speed"))
    assert {"10k", "20k", "30k"} <= set(speeds)


def test_the_bars_of_memory_are_to_scale():
    parts = {"weights": 2**30, "activations": 3 * 2**30, "something new": 2**29}
    svg = plots.memory_chart("a", 800, parts, 2 * 2**30)
    # half a GiB, one, the peak of two, three, and the paper behind all of them
    widths = bar_widths(svg)
    assert [round(width / widths[0], 1) for width in widths] == [1, 2, 4, 6, 9]
    assert "measured" in texts(svg)
    label = ElementTree.fromstring(str(svg)).attrib["aria-label"].replace(SPACE, " ")
    assert label.startswith("Planned 4.50 GiB, measured peak 2.00 GiB. weights 1.00 GiB")


def test_a_plan_without_a_peak_is_one_bar():
    svg = plots.memory_chart("a", 800, {"weights": 2**30}, None)
    assert "plan" in texts(svg) and "measured" not in texts(svg)
