import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from qtune.data.sample import Sample

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("packing")


def samples(*lengths: int) -> list[Sample]:
    return [Sample(f"x:{i}", [0] * n, [1.0] * n) for i, n in enumerate(lengths)]


def test_quick_run_writes_every_variant(
    script: ModuleType,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, data = tmp_path / "results/packing.json", tmp_path / "questions.jsonl"
    rows = [{"question": "How many? " * (i % 5 + 1), "answer": f"{i}" * 20} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["packing.py", "--model", str(tiny_model), "--quick", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--data", str(data), "--out", str(out)])
    script.main()
    printed = capsys.readouterr().out
    report = json.loads(out.read_text("utf-8"))
    assert report["settings"]["data"] == "questions.jsonl"
    assert len(report["tokens_per_step"]) == 2
    (case,) = report["cases"]
    assert list(case["variants"]) == list(script.VARIANTS)
    for name, found in case["variants"].items():
        assert f"| {name} |" in printed
        assert found["step_s"]["q1"] <= found["step_s"]["median"] <= found["step_s"]["q3"]
        assert len(found["seconds"]) == 2 and 0 <= found["padding_share"] < 1


def test_variants_hold_the_same_samples(script: ModuleType) -> None:
    given = samples(40, 300, 90, 20, 10, 200, 80, 60)
    for name, variant in script.VARIANTS.items():
        groups = variant(given, 400)
        assert sorted(id(s) for group in groups for s in group) == sorted(map(id, given)), name
    assert [len(group) for group in script.padded_as_they_come(given, 400)] == [4, 4]


def test_positions_are_those_that_the_model_computes(script: ModuleType) -> None:
    groups = [samples(100, 30), samples(20)]
    assert script.positions(groups, True) == 256 + 128
    assert script.positions(groups, False) == 2 * 104 + 24


def test_figures_are_of_the_same_round(script: ModuleType) -> None:
    def took(*seconds: float) -> dict[str, dict[str, float]]:
        pairs = zip(script.VARIANTS, seconds, strict=True)
        return {name: {"seconds": s, "loss": 1.0, "positions": 200} for name, s in pairs}

    rounds = [
        {"tokens": 100, "variants": took(1.0, 2.0, 3.0)},
        {"tokens": 100, "variants": took(2.0, 4.0, 8.0)},
        {"tokens": 100, "variants": took(4.0, 8.0, 8.0)},
    ]
    found = script.summaries(rounds)
    assert found["packed"]["tokens_per_s"]["median"] == 50
    assert found["padded, similar lengths together"]["packed_is_faster"]["median"] == 2
    assert found["padded as they come"]["packed_is_faster"]["median"] == 3
    assert found["packed"]["padding_share"] == 0.5


def test_losses_that_differ_are_refused(script: ModuleType) -> None:
    script.check_losses({"packed": 2.0, "other": 2.01})
    for other in (2.1, float("nan")):
        with pytest.raises(ValueError, match="losses of one step differ"):
            script.check_losses({"packed": 2.0, "other": other})
