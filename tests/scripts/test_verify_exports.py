"""What the script makes of a program's answers; the programs are played by a few lines here."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import verify_exports
from verify_exports import Program, Row, exports, job, log_probabilities, play, table_line

ENTRY = {
    "prompt_ids": [5, 6],
    "greedy_ids": [7, 3],
    "greedy_logprobs": [-0.2, -0.1],
    "top_ids": [[7, 2], [3, 9]],
    "top_logprobs": [[-0.2, -2.0], [-0.1, -3.0]],
}
WRITTEN = {"export": "gptq", "form": "pair", "golden": [ENTRY]}


def program(answer: dict[str, Any], tmp_path: Path) -> list[str]:
    """A command that gives this answer to every prompt, and notes what it was asked."""
    found = json.dumps({"version": "toy 1", "answers": [answer]})
    source = (
        "import sys, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'asked.json')!r}).write_text("
        "pathlib.Path(sys.argv[1]).read_text())\n"
        f"pathlib.Path(sys.argv[2]).write_text({found!r})\n"
    )
    path = tmp_path / "program.py"
    path.write_text(source)
    return [sys.executable, str(path)]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_exports.PROGRAMS, "toy", Program("", lambda name: True, {}))


def test_the_same_answer_is_right(tmp_path: Path) -> None:
    answer = {"logprobs": [{"7": -0.2, "2": -2.0}, {"3": -0.1, "9": -3.0}], "greedy_ids": [7, 3]}
    row = play(tmp_path, WRITTEN, "toy", program(answer, tmp_path))
    assert row.is_right and row.version == "toy 1"
    assert (row.nll, row.expected_nll) == (pytest.approx(0.15), pytest.approx(0.15))
    assert (row.change, row.swaps, row.greedy, row.tokens) == (pytest.approx(0), 0, 1, 2)
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["golden"] == [ENTRY] and asked["adapter"] is None


@pytest.mark.parametrize(
    ("second", "greedy", "swaps", "same"),
    [
        ({"9": -0.1, "3": -3.0}, [7, 9], 1, 0.5),
        # shifted, and still the best
        ({"3": -0.9, "9": -3.0}, [7, 3], 0, 1.0),
    ],
)
def test_what_differs_is_found(
    second: dict[str, float], greedy: list[int], swaps: int, same: float, tmp_path: Path
) -> None:
    answer = {"logprobs": [{"7": -0.2, "2": -2.0}, second], "greedy_ids": greedy}
    row = play(tmp_path, WRITTEN, "toy", program(answer, tmp_path))
    assert not row.is_right
    assert (row.swaps, row.greedy) == (swaps, same) and row.change > 0.1


def test_a_program_that_fails_is_recorded(tmp_path: Path) -> None:
    command: Sequence[str] = [sys.executable, "-c", "raise SystemExit('no such model')"]
    row = play(tmp_path, WRITTEN, "toy", command)
    assert row.error == "no such model" and not row.is_right
    assert "no such model" in table_line(row)


def test_adapters_go_onto_their_base(tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": "/models/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    asked = job(tmp_path, WRITTEN | {"form": "adapter"})
    assert (asked["folder"], asked["adapter"]) == ("/models/base", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    asked = job(tmp_path, WRITTEN)
    assert (asked["folder"], asked["adapter"]) == (str(tmp_path), str(tmp_path / "adapter"))


def test_exports_of_a_run_are_found(tmp_path: Path) -> None:
    for name in ("gptq", "awq", ".awq.partial/x"):
        folder = tmp_path / "export" / name
        folder.mkdir(parents=True)
        (folder / "qtune.json").write_text("{}")
    found = [tmp_path / "export" / name for name in ("awq", "gptq")]
    assert list(exports([tmp_path])) == found
    assert list(exports([tmp_path / "export" / "awq"])) == found[:1]


def test_tokens_that_are_not_among_the_candidates_are_unlikely() -> None:
    found = log_probabilities(ENTRY, [{"7": -0.5}, {"1": -0.25}])
    assert found.shape == (2, 10)
    assert (found[0, 7], found[1, 1], found[1, 3]) == (-0.5, -0.25, -100)


@pytest.mark.parametrize("change", [0.2, float("nan")])
def test_only_small_changes_are_right(change: float) -> None:
    assert Row("awq", "pair", "vllm", change=0.05).is_right
    assert not Row("awq", "pair", "vllm", change=change).is_right


def test_programs_take_the_exports_that_are_for_them() -> None:
    takes = {name: program.takes for name, program in verify_exports.PROGRAMS.items()}
    names = ("adapter", "bf16", "gptq", "awq", "compressed-tensors-w8a8", "onnx", "gguf-q8_0")
    taken = {name: [export for export in names if takes[name](export)] for name in takes}
    assert taken["vllm"] == [*names[:5]]
    assert taken["genai"] == ["onnx"] and taken["transformers"] == ["gptq", "awq"]
    for name in ("vllm", "genai", "transformers"):
        assert (verify_exports.HERE / verify_exports.PROGRAMS[name].file).is_file()
