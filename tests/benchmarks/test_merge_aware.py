"""The recovery table: what its columns are made of. The measuring itself takes minutes."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from qtune.evaluate.perplexity import Likelihood, SampleLoss

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def merge_aware(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("merge_aware")


def measured(*losses: float) -> Likelihood:
    samples = [SampleLoss(loss, 1.0) for loss in losses]
    return Likelihood(sum(losses) / len(losses), len(losses), kl=0.01, top1=0.9, samples=samples)


def test_rows_are_compared_with_the_adapter_beside_the_codes(merge_aware: ModuleType) -> None:
    reference, other = measured(1.0, 2.0), measured(1.5, 2.5)
    assert merge_aware._row(reference, reference) == {"loss": 1.5, "tokens": 2}
    row = merge_aware._row(other, reference)
    assert row["change"] == 0.5 and row["standard_error"] == 0 and row["kl"] == 0.01


def test_the_table_tells_what_share_of_the_gain_is_kept(merge_aware: ModuleType) -> None:
    rows = {
        "LoRA beside the codes": {"loss": 1.0, "tokens": 9},
        "untuned": {"loss": 3.0, "change": 2.0, "standard_error": 0.1, "kl": 1.0, "top1": 0.5},
        "merge-aware": {"loss": 1.1, "change": 0.1, "standard_error": 0.02, "kl": 0.1, "top1": 0.9},
    }
    text = merge_aware.page("a\n" + "old\n".join(merge_aware.MARKS) + "\nb\n", {"nf4": rows})
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert "| nf4 | LoRA beside the codes | 1.0000 |  | 1.000 |  |  |" in text
    assert "| nf4 | untuned | 3.0000 | +2.0000 ± 0.1000 | 0.000 | 1.0000 | 50.0% |" in text
    assert "| nf4 | merge-aware | 1.1000 | +0.1000 ± 0.0200 | 0.950 | 0.1000 | 90.0% |" in text


def test_recipes_differ_in_what_their_way_says(
    merge_aware: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 50)
    given = ["x", "--data", "rows.jsonl", "--text", str(text), "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", given)
    options = merge_aware._options()
    plain, aware, qa = (
        merge_aware._recipe("int2", way, options) for way in ("LoRA", "merge-aware", "QA-LoRA")
    )
    assert not plain.train.merge_aware and aware.train.merge_aware
    assert (plain.adapter, qa.adapter) == ("lora", "qa-lora")
    assert plain.quant == aware.quant == qa.quant and plain.quant.rotate
    assert len({recipe.run for recipe in (plain, aware, qa)}) == 3
