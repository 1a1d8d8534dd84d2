import re
from xml.etree import ElementTree

import matplotlib

from qtune.report.svg import COLOURS, TEXT_PX, new_figure, settings, to_svg


def drawn(name="chart", label="what it shows"):
    with settings(name):
        figure = new_figure(400, 200)
        axes = figure.add_subplot()
        axes.plot([0, 1], [2, 3], color=COLOURS["accent"], marker="o")
        axes.set_title("a & <b>", color=COLOURS["ink"])
        return str(to_svg(figure, name, label))


def test_the_size_is_in_css_pixels_and_the_label_is_there():
    root = ElementTree.fromstring(drawn(label='5 < 6 & "so on"'))
    assert root.tag == "svg" and root.attrib["role"] == "img"
    assert (root.attrib["width"], root.attrib["height"]) == ("400", "200")
    assert root.attrib["aria-label"] == '5 < 6 & "so on"'


def test_colours_are_those_of_the_page():
    text = drawn()
    assert "var(--accent)" in text and "var(--ink)" in text
    assert not re.search(r"#[0-9a-f]{6}", text)


def test_text_is_text_in_the_font_of_the_page():
    root = ElementTree.fromstring(drawn())
    texts = list(root.iter("text"))
    assert "a & <b>" in ["".join(text.itertext()) for text in texts]
    styles = " ".join(text.attrib["style"] for text in texts)
    assert f"font-size: {TEXT_PX}px" in styles
    assert "DejaVu" not in styles and "font:" not in styles


def test_nothing_points_outside():
    text = drawn()
    assert "http" not in text and "<style" not in text and "<metadata" not in text


def test_identifiers_carry_the_name_and_are_all_there():
    text = drawn("first")
    names = re.findall(r'id="([^"]+)"', text)
    assert names and len(names) == len(set(names))
    assert all(name.startswith("first-") for name in names)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert used and {a or b for a, b in used} <= set(names)


def test_drawing_is_repeatable_and_leaves_no_settings():
    before = dict(matplotlib.rcParams)
    assert drawn() == drawn()
    assert dict(matplotlib.rcParams) == before
