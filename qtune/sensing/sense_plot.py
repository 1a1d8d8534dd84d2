"""The plot of `qtune sense`: what each layer loses, format by format, along the model.

One panel for each kind of layer, all to the same logarithmic scale, so that it is seen at once
which kind and which end of the model needs more bits. What is drawn is what `qtune plan` goes by.
A layer that moves nothing lies on the lower edge.
"""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from qtune.sensing.sensitivity import SenseFile, Sensitivity

# panels side by side
COLUMNS = 4
LEAST = 1e-6


def plot(file: SenseFile, path: Path) -> None:
    """Write the plot as a PNG."""
    kinds = _by_kind(file)
    rows = -(-len(kinds) // COLUMNS) or 1
    figure = Figure(figsize=(12, 2.6 * rows), dpi=110, layout="constrained")
    figure.subplots(rows, COLUMNS, sharex=True, sharey=True)
    panels = figure.axes
    for axes, (kind, formats) in zip(panels, kinds.items(), strict=False):
        for name, found in formats.items():
            losses = [max(LEAST, it.divergence) for it in found]
            axes.plot(range(len(losses)), losses, marker=".", lw=1, label=name)
        axes.set_title(kind, fontsize=9)
        axes.set_yscale("log")
        axes.grid(lw=0.4)
    panels[0].legend(frameon=False, fontsize=7)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    figure.supxlabel("block")
    figure.supylabel("KL in nats a token, by this layer alone")
    figure.savefig(path)


def _by_kind(file: SenseFile) -> dict[str, dict[str, list[Sensitivity]]]:
    """Measurements by the last part of the layer's name, then by format, in the model's order."""
    kinds: dict[str, dict[str, list[Sensitivity]]] = defaultdict(lambda: defaultdict(list))
    for it in file.found:
        kinds[it.layer.rpartition(".")[2]][it.format].append(it)
    return kinds
