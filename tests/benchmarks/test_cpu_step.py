import json
import multiprocessing
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import warm

FOLDER = Path(__file__).parents[2] / "benchmarks"
VARIANTS = (
    "peft bf16",
    "qtune nf4",
    "peft bitsandbytes nf4",
    "peft bitsandbytes nf4 prepared",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("cpu_step")


def steps() -> dict[str, list[tuple[float, float]]]:
    """Two steps of warm-up and three measured ones, by variant."""
    return {
        "peft bf16": [(9.0, 3.0), (9.0, 2.9), (2.0, 2.8), (4.0, 2.7), (8.0, 2.6)],
        "qtune nf4": [(9.0, 3.3), (9.0, 3.2), (1.0, 3.1), (1.0, 3.0), (4.0, 2.9)],
        "peft bitsandbytes nf4": [(9.0, 3.31), (9.0, 3.2), (4.0, 3.1), (8.0, 3.0), (16.0, 2.9)],
    }


def test_quick_run_writes_a_case_for_every_variant(
    script: ModuleType,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results/step.json"
    words = ["cpu_step.py", "--model", str(tiny_model), "--quick", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    context = warm.context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    script.main()
    printed = capsys.readouterr().out
    report = json.loads(out.read_text("utf-8"))
    assert report["settings"]["batch"] * report["settings"]["length"] == 128
    (case,) = report["cases"]
    assert case["threads"] == case["environment"]["threads"] == 1
    assert tuple(case["variants"]) == VARIANTS
    for name, found in case["variants"].items():
        assert f"| {name} |" in printed
        assert len(found["step_s"]) == 2
        assert found["last_loss"] < found["first_loss"]


def test_ratios_are_of_the_same_round(script: ModuleType) -> None:
    found = script.summaries(steps(), num_tokens=8)
    assert found["peft bf16"]["tokens_per_s"] == {"median": 2.0, "q1": 1.5, "q3": 3.0}
    assert found["peft bf16"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    # by round: 2, 4, 2
    assert found["qtune nf4"]["ratio"] == {"median": 2.0, "q1": 2.0, "q3": 3.0}
    assert found["qtune nf4"]["step_s"] == [1.0, 1.0, 4.0]


def test_rounds_begin_with_different_variants(script: ModuleType) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self) -> tuple[float, float]:
            order.append(self.name)
            return 1.0, 1.0

    found = script.measure({name: Fake(name) for name in "abc"}, rounds=1)
    assert "".join(order) == "abcbcacab"
    assert {name: len(own) for name, own in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_losses_that_agree_pass(script: ModuleType) -> None:
    script.check_losses(steps())


@pytest.mark.parametrize(
    ("name", "at", "loss", "complaint"),
    [
        ("qtune nf4", 0, 3.5, "differ in their first loss"),
        ("qtune nf4", 0, float("nan"), "differ in their first loss"),
        ("peft bf16", 0, 2.0, "far from"),
        ("qtune nf4", -1, 3.3, "qtune nf4 does not learn"),
        ("qtune nf4", -1, float("nan"), "qtune nf4 does not learn"),
    ],
)
def test_broken_models_are_refused(
    script: ModuleType, name: str, at: int, loss: float, complaint: str
) -> None:
    broken = steps()
    broken[name][at] = (1.0, loss)
    with pytest.raises(ValueError, match=complaint):
        script.check_losses(broken)
