"""Everything that only a GPU can show, in one command of less than nine minutes.

    python scripts/gpu_suite.py --out benchmarks/results/DATE-GPU.json

The parts: `correctness` of every op and gradient, `kernels` against bitsandbytes, `steps` of
training against transformers + PEFT + bitsandbytes and against unsloth's calls, and the
`quickstart` with its exact match (it needs --model, the folder or file of SmolLM2-135M-Instruct).
Each part has a budget of seconds and leaves a row for each case; a case that fails is recorded with
its error and the rest goes on; what the budget has no time for is recorded as skipped
(gpu/processes.py). Exit code 1: a result is wrong, or a case failed.

benchmarks/README.md says how to run it on this project's GPU machine, which has no network.
`--device cpu --quick` runs the same code on tiny shapes, to show that it runs; such results are
marked and no table takes them.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu.case import Context
from gpu.facts import facts
from gpu.processes import BUDGETS, Share, run_share, supervise

from qtune.files import write_text

MOST_SHOWN = 20


def main() -> int:
    """Run the chosen parts, or as a child of the suite a share of one; the exit code."""
    chosen = _arguments()
    context = Context(torch.device(chosen.device), chosen.quick, chosen.seed, chosen.model)
    if chosen.share:
        part, first, of = chosen.share
        share = Share(part, int(first), int(of))
        run_share(share, context, chosen.rows, time.monotonic() + chosen.seconds)
        return 0
    if context.on_gpu and not torch.cuda.is_available():
        print("error: there is no GPU here; `--device cpu --quick` tries the code", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"suite": 1, "quick": chosen.quick, "seed": chosen.seed}
    report |= {"facts": facts(context.device, chosen.commit), "parts": {}}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    for part in chosen.only:
        report["parts"][part] = supervise(part, context)
        # whatever happens to later parts, this one is safe
        write_text(chosen.out, json.dumps(report, indent=1) + "\n")
        print(_summary(part, report["parts"][part]), flush=True)
    rows = [row for part in report["parts"].values() for row in part["rows"]]
    return int(any(_failed(row) for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=Path(f"{datetime.now(UTC):%Y-%m-%d}-gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; no speeds to be shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct for the quickstart")
    parser.add_argument("--commit", help="where the working tree has no git folder")
    # what the suite tells its children
    parser.add_argument("--share", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _summary(part: str, result: dict[str, Any]) -> str:
    rows = result["rows"]
    wrong = [row for row in rows if _failed(row)]
    skipped = sum("skipped" in row for row in rows)
    words = f"{part}: {len(rows)} cases, {len(wrong)} failed, {skipped} skipped"
    lines = [f"{words}, {result['seconds']:.0f} s"]
    lines += [f"  failed: {row['case']}: {row.get('error', row)}" for row in wrong[:MOST_SHOWN]]
    return "\n".join(lines)


def _failed(row: dict[str, Any]) -> bool:
    return "skipped" not in row and not row["ok"]


if __name__ == "__main__":
    sys.exit(main())
