import json
from pathlib import Path

import pytest
import torch

from qtune.comparing import compare_formats
from qtune.comparing.compare_formats import compare
from qtune.data.collate import collate
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.evaluate.perplexity import held_out
from qtune.model.load import load_base
from qtune.recipe import Quant
from qtune.setup import open_setup
from qtune.train.parallel import open_accelerator

# the tiny model's head is tied, of which PEFT warns; a few tokens are few for calibration
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:No artists with labels:UserWarning"),
]


@pytest.fixture
def recipe(tiny_recipe):
    calibration = {"tokens": 256, "length": 64}
    made = tiny_recipe(evaluate={"loss_rows": 4, "answer_rows": 1})
    from dataclasses import replace

    settings = replace(made.quant.calibration, **calibration)
    return replace(made, quant=replace(made.quant, calibration=settings))


def loss_of(recipe, quant) -> float:
    """The loss of the base in that form on the held-out rows, measured here."""
    setup = open_setup(recipe, open_accelerator())
    model = load_base(Path(recipe.model), quant, device=torch.device("cpu"))
    samples: list[Sample] = list(setup.data.held_out)
    return held_out(model, [collate([sample], multiple=128) for sample in samples]).loss


def test_forms_are_measured_against_the_16_bit_model(recipe, tmp_path):
    found = compare(recipe, ["nf4", "int2"], out=tmp_path / "out")
    lines = {line.name: line for line in found.lines}
    assert list(lines) == ["16-bit", "nf4", "int2"]
    dense = loss_of(recipe, None)
    assert lines["16-bit"].loss == pytest.approx(dense, abs=0.002)
    assert lines["16-bit"].nats == 0 and lines["16-bit"].bits == 16
    for name in ("nf4", "int2"):
        change = loss_of(recipe, Quant(format=name)) - dense
        assert lines[name].nats == pytest.approx(change, abs=0.002)
        assert lines[name].kl > 0 and lines[name].top1 <= 1 and lines[name].answers == 1
    assert lines["int2"].bits < 2.6 < 4 < lines["nf4"].bits < 4.4
    assert lines["int2"].size_bytes < lines["nf4"].size_bytes < lines["16-bit"].size_bytes
    for name in ("compare.json", "compare.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_what_is_measured_is_not_measured_again(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = compare(recipe, ["nf4"], out=out)
    loaded = []
    real = compare_formats.load_base
    monkeypatch.setattr(
        compare_formats, "load_base", lambda *a, **o: loaded.append(a[1]) or real(*a, **o)
    )
    again = compare(recipe, ["nf4"], out=out)
    assert again.lines == first.lines and loaded == []
    assert "nf4: measured before" in capsys.readouterr().out
    # of the 16-bit model its losses and distributions are needed once more
    more = compare(recipe, ["nf4", "int8"], out=out)
    assert [quant and quant.format for quant in loaded] == [None, "int8"]
    assert [line.name for line in more.lines] == ["16-bit", "int8", "nf4"]
    content = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in content["lines"]] == ["16-bit", "int8", "nf4"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_and_starts_are_made_as_in_a_run(recipe, tmp_path):
    found = compare(recipe, ["int3"], ["nearest", "gptq"], ["zero", "cloq"], tmp_path / "out")
    lines = {line.name: line for line in found.lines}
    assert set(lines) == {"16-bit", "int3", "int3 gptq", "int3 cloq", "int3 gptq cloq"}
    assert len({line.loss for line in lines.values()}) == 5
    # rank 4 on all layers of both blocks, two bytes each
    a_and_b = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) * 4
    assert lines["int3 cloq"].adapter_bytes == 2 * a_and_b
    assert lines["int3"].adapter_bytes == 0


def test_other_data_is_another_comparison(recipe, tiny_recipe, tmp_path):
    compare(recipe, [], out=tmp_path / "out")
    other = tiny_recipe(evaluate={"loss_rows": 2, "answer_rows": 1})
    with pytest.raises(UserError, match="compares on something else"):
        compare(other, [], out=tmp_path / "out")


def test_a_model_that_does_not_fit_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_formats, "available_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="measures against the 16-bit model, which takes"):
        compare(recipe, ["nf4"], out=tmp_path / "out")


def test_the_folder_stands_beside_the_run(recipe):
    compare(recipe, [])
    assert (recipe.run.parent / "run-compare" / "compare.md").exists()
    assert not recipe.run.exists()
