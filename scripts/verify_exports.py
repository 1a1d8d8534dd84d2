"""Exports played to the programs that serve them, each in an environment of its own.

    python scripts/verify_exports.py RUN_OR_EXPORT ... --vllm PYTHON --genai PYTHON \
        --transformers PYTHON --out benchmarks/results/verify_exports.json

Opt-in, for these are too heavy for every change: vLLM alone takes 3.5 GB. Of each export the golden
prompts in its qtune.json are played: the log-probabilities of every token of the expected answer,
given those before it, and what the program answers greedily. Both were written down from the
library that the export is for when it was made, so vLLM and qtune's own check are held against one
another. Programs whose PYTHON is not named are left out. benchmarks/README.md says how to install
them. Exit code 1: one failed, or differs by more than rounding explains.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtune.export.folder import golden
from qtune.files import write_text

HERE = Path(__file__).parent / "served"
# on a CPU vLLM rounds the inputs of 4-bit layers to 8 bits unless told otherwise
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
GPTQMODEL = ("gptq", "gptq-int8", "awq")
SECONDS = 1800


@dataclass(frozen=True)
class Program:
    """What serves exports: its file in served/, and the names of exports that it takes."""

    file: str
    takes: Callable[[str], bool]
    environment: dict[str, str]


PROGRAMS = {
    "vllm": Program(
        "with_vllm.py",
        lambda name: name in ("adapter", "bf16", "fp16", *GPTQMODEL) or name.startswith("compress"),
        VLLM,
    ),
    "genai": Program("with_genai.py", lambda name: name == "onnx", {}),
    "transformers": Program("with_transformers.py", lambda name: name in GPTQMODEL, {}),
}


@dataclass(frozen=True)
class Row:
    """What a program makes of an export.

    `nll` is the mean over the tokens of expected answers, `expected_nll` that in qtune.json;
    `change` the mean of golden.compare in nats. `swaps` counts prompts whose answer, read token by
    token, has another best one; `greedy` is the share of tokens that it generates as expected.
    """

    export: str
    form: str
    program: str
    version: str = ""
    expected_nll: float = 0.0
    nll: float = 0.0
    change: float = 0.0
    swaps: int = 0
    greedy: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it ran, and nothing differs by more than rounding explains."""
        return self.error is None and self.swaps == 0 and self.change <= golden.MAX_CHANGE


def main() -> int:
    """Play all exports to all programs named; 1 where any is wrong."""
    chosen = _arguments()
    rows: list[Row] = []
    for folder in exports(chosen.folders):
        written = json.loads((folder / "qtune.json").read_text("utf-8"))
        for name, program in PROGRAMS.items():
            python = getattr(chosen, name)
            if python is None or not program.takes(written["export"]):
                continue
            row = play(folder, written, name, [python, str(HERE / program.file)])
            rows.append(row)
            print(table_line(row), flush=True)
            # whatever happens to later ones, this one is safe
            text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=1)
            write_text(chosen.out, text + "\n")
    return int(not rows or not all(row.is_right for row in rows))


def exports(folders: Sequence[Path]) -> Iterator[Path]:
    """The exported folders among these, and in the runs among them."""
    for folder in folders:
        inner = sorted((folder / "export").glob("*/qtune.json"))
        for path in inner or [folder / "qtune.json"]:
            yield path.parent


def play(folder: Path, written: dict[str, Any], name: str, command: Sequence[str]) -> Row:
    """What the program makes of an export, whose qtune.json is `written`."""
    began, row = time.monotonic(), Row(written["export"], written["form"], name)
    try:
        found = _answers(job(folder, written), command, PROGRAMS[name].environment)
    except RuntimeError as error:
        return Row(row.export, row.form, name, error=str(error))
    seconds = time.monotonic() - began
    return _compared(row, written["golden"], found, seconds)


def job(folder: Path, written: dict[str, Any]) -> dict[str, Any]:
    """What a program is given: the model's folder, the adapter on it or None, the prompts."""
    inner = folder / "adapter"
    adapter = inner if inner.is_dir() else None
    if written["form"] == "adapter":
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        folder, adapter = Path(settings["base_model_name_or_path"]), folder
    return {
        "folder": str(folder.absolute()),
        "adapter": str(adapter.absolute()) if adapter else None,
        "golden": written["golden"],
    }


def table_line(row: Row) -> str:
    """A row of a Markdown table."""
    cells: list[str] = [row.export, row.form, row.version or row.program]
    if row.error is None:
        cells += [f"{row.expected_nll:.4f}", f"{row.nll:.4f}", f"{row.change:.4f}"]
        cells += [str(row.swaps), f"{row.greedy:.0%}", f"{row.seconds:.0f} s"]
    else:
        cells.append(row.error)
    return f"| {' | '.join(cells)} |"


def _answers(
    given: dict[str, Any], command: Sequence[str], environment: dict[str, str]
) -> dict[str, Any]:
    """What the program writes down; RuntimeError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "job.json", Path(place) / "answers.json"
        asked.write_text(json.dumps(given))
        done = subprocess.run(
            [*command, asked, answered],
            env=os.environ | OFFLINE | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode or not answered.exists():
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise RuntimeError(said[-1])
        found: dict[str, Any] = json.loads(answered.read_text())
        return found


def _compared(
    row: Row, expected: list[dict[str, Any]], found: dict[str, Any], seconds: float
) -> Row:
    changes, swaps, same = [], 0, 0
    losses: list[tuple[float, float]] = []
    for entry, answer in zip(expected, found["answers"], strict=True):
        ids = entry["greedy_ids"]
        values = log_probabilities(entry, answer["logprobs"])
        replay = golden.compare(entry, values)
        changes.append(replay.change)
        swaps += replay.first is not None
        same += sum(a == b for a, b in zip(ids, answer["greedy_ids"], strict=False))
        own = [values[i, token].item() for i, token in enumerate(ids)]
        losses += zip(entry["greedy_logprobs"], own, strict=True)
    tokens = len(losses)
    sums = [-sum(side) / tokens for side in zip(*losses, strict=True)]
    change = sum(changes) / len(changes)
    return Row(
        row.export, row.form, row.program, found["version"], *sums, change, swaps, same / tokens,
        tokens, seconds,
    )  # fmt: skip


def log_probabilities(entry: dict[str, Any], candidates: list[dict[str, float]]) -> torch.Tensor:
    """Log-probabilities [A, V] of the tokens of an answer, up to the largest id that counts.

    `candidates` are those of each token that a program gave; all others are taken as unlikely.
    """
    known = {int(token) for place in candidates for token in place}
    known |= {token for top in entry["top_ids"] for token in top} | {*entry["greedy_ids"]}
    values = torch.full((len(candidates), 1 + max(known)), golden.LOWEST)
    for i, place in enumerate(candidates):
        for token, value in place.items():
            values[i, int(token)] = value
    return values


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or exported folders")
    for name, program in PROGRAMS.items():
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"runs {program.file}")
    default = Path("benchmarks/results/verify_exports.json")
    parser.add_argument("--out", type=Path, default=default, help="figures, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
