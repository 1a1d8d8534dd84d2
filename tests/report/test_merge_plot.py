from xml.etree import ElementTree

import pytest

from qtune.report.merge_plot import kinds, limits, merge_chart
from qtune.report.numbers import SPACE


def layer(name, change=0.01, error=0.1, share=0.5):
    return {"layer": name, "change_ratio": change, "error_ratio": error, "share": share}


LAYERS = [
    layer("model.layers.10.mlp.down_proj", 0.03),
    layer("model.layers.2.mlp.down_proj", 0.01, share=0.1),
    layer("model.layers.2.self_attn.q_proj", 0.02),
    layer("lm_head", 0.001),
]


def test_layers_are_sorted_by_kind_and_block():
    down, query, head = kinds(LAYERS)
    assert (down.name, down.blocks, down.changes) == ("down_proj", [2, 10], [0.01, 0.03])
    assert down.share == pytest.approx(0.3) and down.errors == [0.1, 0.1]
    assert (query.name, query.blocks) == ("q_proj", [2]) and (head.name, head.blocks) == (
        "lm_head",
        [0],
    )


def test_experts_of_a_block_are_averaged():
    experts = [layer(f"model.layers.3.mlp.experts.{i}.up_proj", 0.01 * i) for i in (1, 2, 3)]
    (kind,) = kinds(experts)
    assert kind.blocks == [3] and kind.changes == pytest.approx([0.02])


def test_all_kinds_share_a_scale_that_holds_them():
    low, high = limits(kinds(LAYERS))
    assert low < 0.001 and high > 0.1
    assert limits([]) == (0.01, 1.0)


def test_both_figures_are_drawn_over_the_blocks():
    (kind, *_) = kinds(LAYERS)
    svg = ElementTree.fromstring(str(merge_chart("m", 330, kind, (0.005, 0.2))))
    texts = {"".join(text.itertext()) for text in svg.iter("text")}
    assert {"1 %", "10 %", "block"} <= texts
    styles = [path.attrib["style"] for path in svg.iter("path") if "style" in path.attrib]
    assert {role for role in ("accent", "soft") if any(f"--{role}" in s for s in styles)} == {
        "accent",
        "soft",
    }
    label = svg.attrib["aria-label"].replace(SPACE, " ")
    assert label == (
        "down_proj: the adapter changes weights by 2.00 %, quantization by 10.00 %, on mean"
    )
