import re
from xml.etree import ElementTree

import pytest

from qtune.report.numbers import SPACE
from qtune.report.quality_plot import LINE, Point, _free_level, quality_chart

POINTS = [
    Point("adapter on nf4", 136, 1.0, None, True),
    Point("bf16", 269, 0.999, 0.002, False),
    Point("fp16", 269, 0.9989, 0.002, False),
    Point("gguf-q4_k_m", 105, 0.977, 0.003, False),
]


def drawn(points=POINTS, width=1000, share=True):
    return ElementTree.fromstring(str(quality_chart("q", width, points, share=share)))


def places(svg):
    """Where each text begins or ends."""
    found = {}
    for text in svg.iter("text"):
        move = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.attrib.get("transform", ""))
        x = move[1] if move else text.attrib["x"]
        y = move[2] if move else text.attrib["y"]
        found["".join(text.itertext())] = float(x), float(y)
    return found


@pytest.mark.parametrize("width", [1000, 340])
def test_every_point_has_its_name_and_no_name_lies_on_another(width):
    found = places(drawn(width=width))
    ys = sorted(found[point.name][1] for point in POINTS[:3])
    assert found["bf16"] != found["fp16"] and found["gguf-q4_k_m"][1] > ys[-1]
    (_, high), (_, low) = found["bf16"], found["fp16"]
    assert low - high >= LINE - 0.1
    assert all(0 <= x <= width for x, _ in found.values())


def test_recovery_is_a_percentage_and_a_loss_is_not():
    assert "100 %" in places(drawn())
    losses = [Point("a", 10, 0.5, None, True), Point("b", 20, 0.7, 0.1, False)]
    svg = drawn(losses, share=False)
    assert not any("%" in text for text in places(svg))
    label = svg.attrib["aria-label"].replace(SPACE, " ")
    assert label == "Held-out loss over size. a 0.5000, exact, at 10 MB, b 0.7000 at 20 MB"


def test_exact_forms_are_full_and_others_rings():
    style = [use.attrib["style"] for use in drawn().iter("use") if "fill" in use.attrib["style"]]
    fills = [re.search(r"fill: var\(--(\w+)\)", one)[1] for one in style]
    assert fills.count("accent") == 1 and fills.count("paper") == 3


def test_points_that_are_all_alike_can_be_drawn():
    drawn([Point("a", 10, 1.0, None, True), Point("b", 10, 1.0, None, True)])


def test_labels_go_down_until_they_are_free():
    placed = [(0, 100, 50), (0, 100, 50 - LINE)]
    assert _free_level(placed, 90, 120, 52) == 50 - 2 * LINE
    assert _free_level(placed, 101, 120, 52) == 52
