"""Time the fused kernels' tiles on the GPU at hand and write its table for qtune_kernels.

    python scripts/tune.py

Every candidate is compiled and checked against float64 first, on poisoned memory, in as many
processes as there are cores; one that does not compile or is not exact is left out. Then all are
timed in one process beside dequantizing and multiplying (gpu/tiles.py). It takes less than eight
minutes on an H200 and writes nothing unless all was measured. Commit the table: tests compile what
is in it ahead of time.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu import tiles
from gpu.facts import facts
from gpu.tiles import Job, Timings

from qtune.files import write_text
from qtune_kernels.tile_tables import FOLDER, Tile, parse_table, table_of

SECONDS = 450.0
MOST_WORKERS = 14


def main() -> int:
    """Measure, write the table, say where; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"default: the GPU's name in {FOLDER.name}/")
    parser.add_argument("--commit", help="where the working tree has no git folder")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: tiles can only be timed on a GPU, and there is none here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + SECONDS
    device = torch.device("cuda", torch.cuda.current_device())
    usable = checked(device)

    def measure(job: Job) -> Timings:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no time was left for {job}; nothing was written")
        return tiles.measure(job, usable[job.kind, job.bits, job.rows], device)

    table = make_table(tiles.entries(measure), device, chosen.commit)
    path = chosen.out or FOLDER / f"{file_name(torch.cuda.get_device_name(device))}.json"
    write_table(path, table)
    print(f"{path}: {len(table['entries'])} entries")
    return 0


def checked(device: torch.device) -> dict[tuple[str, int, int], list[Tile]]:
    """The candidates that compile and are exact, by kind, bits and rows."""
    # shapes do not matter for it: the first class of each stands for all
    cut = next(iter(tiles.CLASSES))
    questions = [
        (job, tile) for job in tiles.jobs() if job.cut == cut for tile in tiles.candidates(job)
    ]
    usable: dict[tuple[str, int, int], list[Tile]] = defaultdict(list)
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for (job, tile), problem in zip(questions, pool.map(refusal, questions), strict=True):
            if problem:
                print(f"left out: {job.kind}, {job.bits} bits, {tile}: {problem}")
            else:
                usable[job.kind, job.bits, job.rows].append(tile)
    return usable


def refusal(question: tuple[Job, Tile]) -> str:
    """Why a tile cannot serve on this GPU, or nothing; compiled code stays in Triton's cache."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return tiles.check(*question, torch.device("cuda"))
    except (OutOfResources, PTXASError, CompilationError, RuntimeError) as error:
        # a pass of the compiler that fails is a RuntimeError; so is a broken GPU, which shows here
        torch.cuda.synchronize()
        return str(error).splitlines()[0]


def make_table(
    entries: list[dict[str, Any]], device: torch.device, commit: str | None
) -> dict[str, Any]:
    """The table's JSON data, with what it was made by and on."""
    made_by = facts(device, commit)
    in_force = table_of(device)
    return {
        "source": "timed by scripts/tune.py",
        "devices": [made_by["gpu"]["name"]],
        "capability": made_by["gpu"]["capability"],
        # what sums were split by while it was timed
        "programs": in_force.programs,
        "max_parts": in_force.max_parts,
        "made_by": made_by,
        "entries": entries,
    }


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table, whole or not at all, an entry a line; ValueError: it is not a right one."""
    parse_table(table)
    head = {key: value for key, value in table.items() if key != "entries"}
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "entries": [\n{lines}\n ]\n}}\n'
    write_text(path, text)


def file_name(device_name: str) -> str:
    """The name of a GPU as a file has it: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
