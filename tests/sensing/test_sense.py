import shutil

import pytest
import torch

from qtune.errors import UserError
from qtune.model.load import load_base
from qtune.planning.planner import plan
from qtune.sensing import layer
from qtune.sensing.sense import sense
from qtune.sensing.sensitivity import read

# so little text is too little, and the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, says the report. " * 40)
    return path


def measured(model, text, **options):
    given = {"formats": ["int4", "int2"], "method": "nearest", "tokens": 128, "length": 32}
    return sense(str(model), text=text, **(given | options))


def test_each_layer_is_measured_in_each_format(tiny_model, text, tmp_path):
    out = tmp_path / "sense.jsonl"
    found = measured(tiny_model, text, out=out)
    assert read(out).found == found.found and len(found.found) == 2 * 7 * 2
    assert out.with_suffix(".png").stat().st_size > 1000
    dense = load_base(tiny_model, None, device=CPU)
    for it in found.found:
        assert it.num_weights == dense.get_submodule(it.layer).weight.numel()
        assert it.divergence > 0 and it.standard_error > 0
    errors = {(it.layer, it.format): it.output_error for it in found.found}
    assert all(errors[n, "int2"] > 4 * errors[n, "int4"] for n, f in errors if f == "int4")
    moved = {(it.layer, it.format): it.divergence for it in found.found}
    assert all(moved[n, "int2"] > 2 * moved[n, "int4"] for n, f in moved if f == "int4")


def test_it_goes_on_where_it_was(tiny_model, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sense.jsonl"
    whole = measured(tiny_model, text, out=out)
    lines = out.read_text().splitlines(keepends=True)
    # the header, six measurements and a part of the seventh
    out.write_text("".join(lines[:7]) + lines[7][:20])
    fitted = []
    real = layer.fit
    monkeypatch.setattr(layer, "fit", lambda *a: fitted.append(a[0]) or real(*a))
    again = measured(tiny_model, text, out=out)
    assert again.found == whole.found and len(fitted) == 28 - 6
    assert "28 measurements" in capsys.readouterr().out
    with pytest.raises(UserError, match="another measurement"):
        measured(tiny_model, text, out=out, tokens=64)


def test_gptq_loses_less_output_than_nearest(tiny_model, text, tmp_path):
    errors = {}
    for method in ("nearest", "gptq+rotate"):
        options = {"method": method, "formats": ["int3"], "out": tmp_path / f"{method}.jsonl"}
        found = measured(tiny_model, text, **options)
        errors[method] = sum(it.output_error for it in found.found)
    assert errors["gptq+rotate"] < 0.8 * errors["nearest"]


def test_a_plan_takes_what_was_measured(tiny_model, text, tmp_path, capsys):
    out = tmp_path / "sense.jsonl"
    measured(tiny_model, text, out=out)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    found = plan([str(folder)], "1GB", 64, serve=True, sense=out, bits_budget=3.2)
    assert found.chosen.measured and found.chosen.sizes.bits <= 3.2
    assert "measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "awq"}, "--method awq: take nearest, gptq or gptq"),
        ({"formats": ["int5"]}, "unknown format 'int5'"),
        ({"formats": ["e8p"]}, "e8p needs quant.method: gptq"),
    ],
)
def test_mistakes_are_said(tiny_model, text, options, words):
    with pytest.raises(UserError, match=words):
        measured(tiny_model, text, **options)
