from pathlib import Path

from matplotlib import image
from matplotlib.figure import Figure

from qtune.sensing.sense_plot import LEAST, plot
from qtune.sensing.sensitivity import Header, SenseFile, Sensitivity

HEADER = Header("small", "gptq", True, 64, "x.txt", "ab12", 2048, 3.25)


def test_each_kind_of_layer_has_its_panel(tmp_path, monkeypatch):
    losses = {"int4": [0.001, 0.0, 0.003], "int2": [0.1, 0.2, 0.3]}
    found = [
        Sensitivity(f"layers.{at}.{kind}", name, 1, 1, 0.1, loss, 0.0)
        for name, values in losses.items()
        for at, loss in enumerate(values)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    ]
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a: (drawn.append(f), save(f, *a)))
    plot(SenseFile(Path("x"), HEADER, found), tmp_path / "sense.png")
    assert image.imread(tmp_path / "sense.png").shape[2] == 4
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    ]
    for axes in panels:
        values = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        # what moves nothing lies on the lower edge
        assert values == {"int4": [0.001, LEAST, 0.003], "int2": losses["int2"]}
