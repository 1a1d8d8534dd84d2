import re
from xml.etree import ElementTree

from qtune.report.score_plot import Bar, score_chart

BARS = [
    Bar("base", 0.2, (0.15, 0.25), False),
    Bar("adapter on nf4", 0.4, (0.35, 0.45), True),
    Bar("gguf-q4_0", 0.3, None, False),
]


def drawn(bars):
    return ElementTree.fromstring(str(score_chart("s", 330, bars, "gsm8k, exact match")))


def texts(svg):
    return ["".join(text.itertext()) for text in svg.iter("text")]


def test_the_models_stand_in_their_order_on_a_scale_of_shares():
    svg = drawn(BARS)
    assert [text for text in texts(svg) if "%" not in text] == [bar.name for bar in BARS]
    assert {"20 %", "30 %"} <= set(texts(svg))
    label = svg.attrib["aria-label"]
    assert label == "gsm8k, exact match: base 0.2, adapter on nf4 0.4, gguf-q4_0 0.3"


def test_points_and_intervals_are_to_scale():
    svg = drawn(BARS)
    points = [use for use in svg.iter("use") if "stroke" in use.attrib["style"]]
    x = [float(use.attrib["x"]) for use in points if "clip-path" not in use.attrib][-3:]
    lines = [path.attrib for path in svg.iter("path") if "fill: none" in path.attrib["style"]]
    spans = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", line["d"]) for line in lines]
    level = [s for s in spans if len(s) == 2 and s[0][1] == s[1][1]]
    widths = {round(float(b) - float(a), 1) for (a, _), (b, _) in level}
    assert len(widths) == 1
    # an interval of 0.1, and points that are 0.2 and 0.1 apart
    (width,) = widths
    assert abs((x[1] - x[0]) - 2 * width) < 0.3 and abs((x[1] - x[2]) - width) < 0.3


def test_what_is_no_share_has_no_percentages():
    assert not any("%" in text for text in texts(drawn([Bar("a", 31.5, None, True)])))
