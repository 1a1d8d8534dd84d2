import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_table_compares_with_ggml(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.syspath_prepend(FOLDER)
    words = ["kquants.py", "--model", str(tiny_model), "--kinds", "Q4_0"]
    monkeypatch.setattr(sys, "argv", words)
    import_module("kquants").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1:3] for row in rows] == [
        [name, form]
        for name in ("normal", "heavy tails", "llama")
        for form in ("alike", "weighted")
    ]
    assert all(0.5 < float(row[4]) <= 1.02 for row in rows)
