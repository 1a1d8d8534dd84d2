"""The speed-up over bitsandbytes by the number of rows, as one chart."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LINES = {"forward": "-", "backward": "--"}


def plot_speedups(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the chart of the kernels part as SVG; the same rows give the same file."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if "bitsandbytes" in row.get("variants", ()) and row.get("kind") in LINES:
            shape = f"{row['out']}x{row['in']}"
            curves[row["kind"], shape].append((row["rows"], row["speedup"]))
    shapes = list(dict.fromkeys(shape for _, shape in curves))
    with matplotlib.rc_context({"svg.hashsalt": "speedup", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for (kind, shape), points in curves.items():
            colour = f"C{shapes.index(shape)}"
            axes.plot(
                *zip(*points, strict=True), LINES[kind], color=colour, label=f"{shape} {kind}"
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows")
        axes.set_ylabel("bitsandbytes' time over ours")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=2)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
