"""A matplotlib figure as an inline SVG that takes its colours and its font from the page.

matplotlib draws in placeholder colours, one for each role, which are then replaced by the CSS
variables of that role: so one drawing serves light, dark and print. Text stays text. Identifiers
get the chart's name in front, since all charts share one page. Figures are made without pyplot, so
nothing is left behind in the process.
"""

import io
import re
from contextlib import AbstractContextManager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# role in page.css -> the colour it has while it is drawn
COLOURS = {
    "ink": "#010101",
    "soft": "#020202",
    "line": "#030303",
    "accent": "#040404",
    "paper": "#050505",
}
TEXT_PX = 12

# an SVG unit is a CSS pixel where matplotlib's point is 1/72 inch
_DPI = 72
_SETTINGS: dict[Any, Any] = {
    "font.size": TEXT_PX,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["soft"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "grid.color": COLOURS["line"],
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def settings(name: str) -> AbstractContextManager[None]:
    """The look of a chart, in force while the block that draws and saves it runs."""
    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name})


def new_figure(width: int, height: int) -> Figure:
    """An empty transparent figure of that many CSS pixels."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    figure.patch.set_visible(False)
    return figure


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element for use within HTML; `label` says in words what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _plain_names(element)
        for key, value in element.attrib.items():
            element.set(key, _themed(_local(value, key, name)))
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{float(width):.0f}",
        "height": f"{float(height):.0f}",
        "role": "img",
        "aria-label": label,
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(root: ElementTree.Element) -> None:
    """Remove metadata, and the style sheet in the figure, which would hold for the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)


def _plain_names(element: ElementTree.Element) -> None:
    """Take the namespaces off: HTML knows the elements of an SVG by their bare names."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}


def _local(value: str, key: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-")


def _themed(value: str) -> str:
    for role, colour in COLOURS.items():
        value = value.replace(colour, f"var(--{role})")
    # some releases of matplotlib write the family on its own, some in the shorthand
    value = re.sub(r"font: (?:\d+ )?([\d.]+)px [^;]*", r"font-size: \1px", value)
    return re.sub(r"font-family: [^;]*;? ?", "", value)
