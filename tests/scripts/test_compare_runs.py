import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, losses: list[float], speed: float) -> Path:
    folder.mkdir()
    lines = [{"step": i + 1, "loss": loss, "tokens_per_s": speed} for i, loss in enumerate(losses)]
    lines.append({"step": len(losses), "held_out_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_equal_runs_show_their_speeds(script: ModuleType, tmp_path: Path) -> None:
    losses = [2.0, 1.5, 1.25]
    lines, equal = script.compare(
        run(tmp_path / "a", losses, 100), run(tmp_path / "b", losses, 150)
    )
    assert equal
    assert lines == [
        "3 of 3 common steps have equal losses",
        "tokens/s: 1.500x (quartiles 1.500-1.500)",
    ]


def test_one_bit_counts(script: ModuleType, tmp_path: Path) -> None:
    before = run(tmp_path / "a", [2.0, 1.5], 100)
    lines, equal = script.compare(before, run(tmp_path / "b", [2.0, 1.5000000000000002], 100))
    assert not equal
    assert lines[0] == "step 2: loss 1.5 -> 1.5000000000000002"


def test_missing_steps_are_no_equality(script: ModuleType, tmp_path: Path) -> None:
    before = run(tmp_path / "a", [2.0, 1.5], 100)
    assert not script.compare(before, run(tmp_path / "b", [2.0], 100))[1]
    (tmp_path / "empty").mkdir()
    assert not script.compare(before, tmp_path / "empty")[1]
