"""What tune.py asks of a tile on the GPU, asked in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
import torch
from gpu import tiles
from gpu.tiles import Job
from interpreter import correct_interpreter
from qtune_kernels.tile_tables import Tile

correct_interpreter()
cpu = torch.device("cpu")
for bits in (8, 4, 3, 2):
    job = Job("forward", bits, 8, (1, 2047))
    assert tiles.check(job, Tile(8, 16, 2, 2, True), cpu, (48, 512)) == "", job
    assert tiles.check(job, Tile(16, 32, 4, 2), cpu, (48, 512)) == "", job
    assert tiles.check(job._replace(kind="backward"), Tile(16, 32, 4, 2), cpu, (48, 512)) == "", job
tiles.fused = lambda kind, x, weight, tile: 1.05 * tiles.unfused(kind, x, weight)
assert tiles.check(job, Tile(16, 32, 4, 2), cpu, (48, 512)).startswith("error 5.")
"""


def test_the_check_takes_exact_tiles_only() -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests/kernels"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
