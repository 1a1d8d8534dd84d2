"""Whether two runs trained the same: step by step, bit for bit, and how their speeds compare.

    python scripts/compare_runs.py runs/before runs/after

A refactoring must leave every loss as it was; a faster step must show its ratio. The exit code is 1
where losses differ.
"""

import argparse
import sys
from pathlib import Path
from statistics import median, quantiles

from qtune.train.log import read_metrics

MOST_SHOWN = 5


def compare(before: Path, after: Path) -> tuple[list[str], bool]:
    """What to print about two run folders, and whether all losses are equal."""
    old, new = (
        {m["step"]: m for m in read_metrics(folder) if "loss" in m} for folder in (before, after)
    )
    steps = sorted(old.keys() & new.keys())
    differing = [step for step in steps if old[step]["loss"] != new[step]["loss"]]
    lines = [
        f"step {step}: loss {old[step]['loss']!r} -> {new[step]['loss']!r}"
        for step in differing[:MOST_SHOWN]
    ]
    lines.append(f"{len(steps) - len(differing)} of {len(steps)} common steps have equal losses")
    if len(steps) > 1:
        ratios = [new[step]["tokens_per_s"] / old[step]["tokens_per_s"] for step in steps]
        low, _, high = quantiles(ratios, n=4)
        lines.append(f"tokens/s: {median(ratios):.3f}x (quartiles {low:.3f}-{high:.3f})")
    return lines, bool(steps) and not differing and old.keys() == new.keys()


def main() -> int:
    """Compare the two run folders named on the command line."""
    parser = argparse.ArgumentParser(description="Compare the training of two runs.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    chosen = parser.parse_args()
    lines, equal = compare(chosen.before, chosen.after)
    print("\n".join(lines))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
