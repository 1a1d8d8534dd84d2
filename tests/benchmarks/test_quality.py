import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoConfig

from qtune.comparing.comparison import read
from qtune.planning.sizes import sizes
from qtune.recipe import Quant

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = "the cat sat on a mat and saw what there was to see of it "


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    path = tmp_path / "text.txt"
    path.write_text((WORDS * 40 + "\n") * 30)
    return path


def arguments(monkeypatch, script, *given):
    monkeypatch.setattr(sys, "argv", [script, *map(str, given)])


def test_a_sweep_ends_in_one_table(text, tiny_model, tmp_path, monkeypatch):
    quality = import_module("quality")
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.json")
    monkeypatch.setattr(quality, "PLOT", tmp_path / "quality.png")
    monkeypatch.setattr(quality, "SENSE_PLOT", tmp_path / "sense.png")
    monkeypatch.setattr(quality, "PAGE", tmp_path / "quality.md")
    (tmp_path / "quality.md").write_text("above\n" + "old\n".join(quality.MARKS) + "\nbelow\n")
    monkeypatch.setattr(quality, "CONTEXT", 64)
    monkeypatch.setattr(
        quality,
        "SWEEPS",
        {
            "nearest": [(["nf4"], ["nearest"], ["zero"], 64)],
            "calibrated": [(["int2"], ["gptq"], ["zero"], 32)],
        },
    )
    given = "--text", text, "--model", tiny_model, "--folder", tmp_path / "work"
    arguments(monkeypatch, "quality.py", *given)
    quality.main()
    found = json.loads((tmp_path / "quality.json").read_text())
    lines = {line["name"]: line for line in found["lines"]}
    (mixed,) = lines.keys() - {"16-bit", "nf4", "int2 g32 gptq"}
    assert mixed.endswith(" mixed gptq+rotate")
    uniform = sizes(AutoConfig.from_pretrained(tiny_model), Quant(format="int3"))
    assert uniform.bits - 0.2 < lines[mixed]["bits"] <= uniform.bits
    assert found["measured_on"]["held_out_rows"] == 8
    assert all((tmp_path / f"{it}.png").stat().st_size > 1000 for it in ("quality", "sense"))
    text = (tmp_path / "quality.md").read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n")
    assert "| nf4 |" in text and "old" not in text


def test_the_page_has_the_figures_of_the_file(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    quality = import_module("quality")
    measured_on = json.loads(quality.RESULTS.read_text("utf-8"))["measured_on"]
    text = quality.PAGE.read_text("utf-8")
    assert quality.page(text, read(quality.RESULTS, measured_on)) == text


def test_runs_of_variants_end_in_one_table(text, tiny_model, tmp_path, monkeypatch):
    tune = import_module("fine_tune")
    monkeypatch.setattr(tune, "RESULTS", tmp_path / "tune.json")
    given = "--text", text, "--model", tiny_model, "--runs", tmp_path / "runs", "--steps", 3
    arguments(monkeypatch, "fine_tune.py", *given, "--only", "QLoRA", "16-bit")
    tune.main()
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert set(rows) == {"16-bit, LoRA", "nf4, LoRA from zero (QLoRA)"}
    assert all(row["base"] > 1 and row["trained"] > 1 for row in rows.values())
