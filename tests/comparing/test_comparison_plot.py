import math

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from qtune.comparing.comparison import Line
from qtune.comparing.comparison_plot import plot


def line(name, bits, nats):
    return Line(
        name=name,
        method="nearest",
        settings="",
        bits=bits,
        model_bits=bits + 2,
        size_bytes=1,
        adapter_bytes=0,
        loss=3 + nats,
        perplexity=20.0,
        nats=nats,
        standard_error=0.01,
        kl=None,
        top1=None,
        exact_match=None,
        answers=0,
        seconds=1.0,
    )


LINES = [
    line("16-bit", 16.0, 0.0),
    line("int8", 8.1, 0.001),
    line("int3", 3.2, 1.1),
    line("int3 gptq", 3.2, 0.5),
    line("int2", 2.2, math.nan),
]


def test_each_method_is_a_series_in_both_halves(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a: (drawn.append(f), save(f, *a)))
    plot(LINES, tmp_path / "compare.png")
    assert image.imread(tmp_path / "compare.png").shape[2] == 4
    (figure,) = drawn
    for axes, shift in zip(figure.axes, (0, 2), strict=True):
        series = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
        # what overflowed is not drawn, nor the reference
        assert series == {
            "nearest": [[8.1 + shift, 0.001], [3.2 + shift, 1.1]],
            "gptq": [[3.2 + shift, 0.5]],
        }
        assert {text.get_text() for text in axes.texts} == {"int8", "int3"}


def test_a_reference_alone_can_be_drawn(tmp_path):
    plot(LINES[:1], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000


pytestmark = pytest.mark.filterwarnings("ignore:No artists with labels:UserWarning")
