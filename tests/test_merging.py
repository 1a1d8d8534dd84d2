"""Which merge is kept, and when none is."""

from dataclasses import replace
from pathlib import Path

import pytest

from qtune import merging, run, run_folder
from qtune.errors import UserError
from qtune.evaluate import compare
from qtune.evaluate.compare import Row
from qtune.recipe import Data, Merge, Quant, Recipe, Train

ROW = Row(name="merged", kind="merged", loss=2.0, perplexity=7.4, tokens=9, size_bytes=1)


def recipe(**parts):
    return Recipe(model="m", data=Data(train="d"), train=Train(steps=1), run=Path("r"), **parts)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, ["original", "dequantized"]),
        ({"merge": Merge(base="original")}, ["original"]),
        ({"quant": Quant(format=None)}, ["original"]),
        ({"adapter": "scales", "quant": Quant(format="int4")}, ["dequantized"]),
    ],
)
def test_what_an_adapter_may_go_onto(parts, expected):
    assert merging.bases(recipe(**parts)) == expected


def test_the_lower_loss_is_kept_and_both_are_told():
    rows = {"original": replace(ROW, loss=1.5), "dequantized": ROW}
    verdict = merging.judge(rows, 0.98)
    assert verdict.chosen == "original" and verdict.refused is None
    assert verdict.why == "held-out loss 1.5000 onto original, 2.0000 onto dequantized"
    assert verdict.merge == compare.Merge("original", verdict.why)


@pytest.mark.parametrize(("recovery", "refused"), [(0.97, True), (0.98, False), (None, False)])
def test_a_merge_below_the_threshold_is_refused(recovery, refused):
    verdict = merging.judge({"original": replace(ROW, recovery=recovery)}, 0.98)
    assert (verdict.refused is not None) == refused
    if refused:
        assert "keeps 97.0%" in verdict.refused and "--force" in verdict.refused


def test_unmeasured_merges_leave_the_trained_model():
    assert merging.judge({"original": None, "dequantized": None}, 0.98) == merging.Verdict(
        "dequantized", "not measured"
    )


def test_a_refused_merge_is_not_written_unless_forced(tiny_recipe):
    made = tiny_recipe(export=("qtune",))
    run.train(made)
    folder = run_folder.open_run(made.run)
    table = compare.read(folder.path / "eval.json")
    assert table.row("base nf4").loss > table.row("adapter on nf4").loss, "nothing was learned"
    # on other weights than it was trained on, an adapter keeps a little less than everything
    strict = replace(folder.recipe.merge, base="original", recovery=1.0)
    folder = replace(folder, recipe=replace(folder.recipe, merge=strict))
    with pytest.raises(UserError, match=r"export bf16: merging keeps 9.*merge.recovery \(100%\)"):
        run.export(folder, ["bf16"])
    assert not list(folder.exports.glob("bf16*"))
    run.export(folder, ["bf16"], force=True)
    assert [path.name for path in folder.exports.glob("bf16*")] == ["bf16"]
    told = folder.read("merge.json")
    assert told["chosen"] == "original" and "keeps 9" in told["refused"]
    names = {layer["layer"] for layer in told["layers"]}
    assert "model.layers.0.mlp.down_proj" in names and len(names) == 14
    # what NF4 loses of weights from a normal distribution
    assert all(layer["error_ratio"] == pytest.approx(0.09, abs=0.02) for layer in told["layers"])
