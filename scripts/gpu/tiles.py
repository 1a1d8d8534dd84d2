"""Which tiles are tried for a GPU's table, what they are timed on, and which of them win.

Rows are measured at the end of their class, shapes are those of Llama 3 8B and 70B, in classes by
the dimension that the tiles of a result are cut from: O forward, I backward. A class has one tile,
the one with the least time over its shapes, each counted as a ratio. Where dequantizing and the
GEMM are faster, larger classes of rows are left to them too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch

from gpu import timing
from gpu.weights import Weight, random_weight
from qtune_kernels.dequantize import dequantize
from qtune_kernels.tile_tables import Range, Tile

ROWS = {
    "forward": (8, 16, 32, 64, 128, 256, 512, 1024),
    "backward": (16, 32, 64, 128, 256, 512, 1024),
}
# the range of the cut dimension, and (that dimension, the other)
CLASSES: dict[Range, tuple[tuple[int, int], ...]] = {
    (1, 2047): ((1024, 4096),),
    (2048, 8191): ((4096, 4096), (4096, 14336)),
    (8192, None): ((8192, 8192), (14336, 4096), (28672, 8192)),
}
GEMM = "dequantize and multiply"
RUNS = 25
MOST_GRAPH_ROWS = 256
GROUP = 64
# O is no multiple of any tile; both are multiples of 16, as in the shapes that are timed
CHECKED = (336, 1536)


class Job(NamedTuple):
    """One class of a table: its kind, bits, rows, and the range of the cut dimension."""

    kind: str
    bits: int
    rows: int
    cut: Range

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The matrices (O, I) that it is timed on."""
        pairs = CLASSES[self.cut]
        return [pair if self.kind == "forward" else pair[::-1] for pair in pairs]


Timings = Mapping[str, Mapping[str, float]]
"""Shape -> the name of a tile, or GEMM -> microseconds."""


def candidates(job: Job) -> list[Tile]:
    """The tiles worth a try; without those that spill registers, compiled for sm_90."""
    rows, wide_codes = job.rows, job.bits >= 4
    if job.kind == "backward":
        return _backward_candidates(rows, job.bits)
    if rows <= 16:
        few = partial(Tile, rows, few_rows=True)
        tiles = [few(64, 2, 4), few(64, 2, 5), few(32, 2, 4), few(64, 4, 4)]
        return [*tiles, few(128, 4, 4), few(128, 2, 3)] if wide_codes else tiles
    if rows <= 32:
        return [Tile(rows, 64, 4, 3), Tile(rows, 64, 4, 4), Tile(rows, 128, 4, 3)]
    if rows <= 64:
        return [Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(64, 128, 8, 3)]
    wide = [Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 128, 4, 3)]
    return [*wide, Tile(256, 128, 8, 2)] if rows >= 256 else wide


def _backward_candidates(rows: int, bits: int) -> list[Tile]:
    if rows <= 64:
        tiles = [Tile(rows, 64, 4, 3), Tile(rows, 64, 4, 4), Tile(rows, 128, 8, 3)]
        return [*tiles, Tile(64, 128, 4, 3)] if rows == 64 and bits >= 4 else tiles
    tiles = [Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)]
    tiles += [Tile(128, 128, 8, 2)] if bits > 2 else [Tile(128, 64, 8, 2)]
    return [*tiles, Tile(128, 64, 4, 3)] if bits >= 4 else tiles


def jobs() -> Iterator[Job]:
    """All classes of a table; those of one kind, width and shape in the order of their rows."""
    for bits in (4, 8, 3, 2):
        for kind, classes in ROWS.items():
            for cut in CLASSES:
                for rows in classes:
                    yield Job(kind, bits, rows, cut)


def entries(measure: Callable[[Job], Timings]) -> list[dict[str, Any]]:
    """The entries of a table, as JSON has them, from what `measure` finds for each job."""
    made: list[dict[str, Any]] = []
    lost: set[tuple[str, int, Range]] = set()
    for job in jobs():
        if (job.kind, job.bits, job.cut) in lost:
            continue
        timings = measure(job)
        best = winner(timings)
        if best == GEMM:
            lost.add((job.kind, job.bits, job.cut))
            tile = None
        else:
            tile = next(t for t in candidates(job) if name(t) == best)
        made.append(_entry(job, tile, timings, best))
    rest = [{"kind": kind, "bits": [2, 3, 4, 8], "most_rows": None, "tile": None} for kind in ROWS]
    return made + rest


def winner(timings: Timings) -> str:
    """The name with the least geometric mean of times."""
    names = set.intersection(*(set(each) for each in timings.values()))
    logs = {
        n: fmean(float(torch.tensor(each[n]).log()) for each in timings.values()) for n in names
    }
    return min(sorted(logs), key=logs.__getitem__)


def name(tile: Tile) -> str:
    """What a tile is called in timings."""
    return "x".join(str(int(size)) for size in tile)


def _entry(job: Job, tile: Tile | None, timings: Timings, best: str) -> dict[str, Any]:
    cut = "out_features" if job.kind == "forward" else "in_features"
    return {
        "kind": job.kind,
        "bits": [job.bits],
        "most_rows": job.rows if tile else None,
        cut: list(job.cut),
        "tile": tile and {key: value for key, value in tile._asdict().items() if value},
        # the winner's microseconds beside those of dequantizing and multiplying
        "us": {shape: [each[best], each[GEMM]] for shape, each in timings.items()},
    }


def measure(job: Job, tiles: Sequence[Tile], device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds of each tile, and of dequantizing and multiplying, on each shape."""
    found = {}
    for shape in job.shapes:
        first = random_weight(shape, job.bits, GROUP, device)
        more = timing.num_sets(first.size_bytes, quick=False) - 1
        weights = [first, *(random_weight(shape, job.bits, GROUP, device) for _ in range(more))]
        spent = timing.compare(
            variants(job, tiles, weights), device, graph=job.rows <= MOST_GRAPH_ROWS, runs=RUNS
        )
        found[f"{shape[0]}x{shape[1]}"] = {key: it["median_us"] for key, it in spent.items()}
    return found


def variants(
    job: Job, tiles: Sequence[Tile], weights: Sequence[Weight]
) -> dict[str, list[Callable[[], Any]]]:
    """The calls of each tile, and of dequantizing and multiplying, one for each matrix."""
    width = weights[0].shape[1 if job.kind == "forward" else 0]
    rows = [
        torch.randn(job.rows, width, dtype=torch.bfloat16, device=weight.packed.device)
        for weight in weights
    ]
    pairs = list(zip(rows, weights, strict=True))
    made = {name(tile): [partial(fused, job.kind, x, w, tile) for x, w in pairs] for tile in tiles}
    made[GEMM] = [partial(unfused, job.kind, x, w) for x, w in pairs]
    return made


def fused(kind: str, x: torch.Tensor, weight: Weight, tile: Tile) -> torch.Tensor:
    """The product with W, or in the backward pass with W^T, by one fused kernel."""
    from qtune_kernels import linear_triton

    weights = (weight.packed, weight.scales, weight.levels, weight.group_size)
    if kind == "forward":
        return linear_triton.linear(x, *weights, weight.shape[0], None, tile)
    return linear_triton.linear_dx(x, *weights, weight.shape[1], tile)


def unfused(kind: str, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The same by dequantizing the whole matrix first."""
    dense = dequantize(*weight.arguments, *weight.shape, x.dtype)
    return x @ (dense.T if kind == "forward" else dense)


def check(job: Job, tile: Tile, device: torch.device, shape: tuple[int, int] = CHECKED) -> str:
    """Why a tile cannot serve: its error where it is inexact, or nothing."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    weight = random_weight(shape, job.bits, GROUP, device)
    width = weight.shape[1 if job.kind == "forward" else 0]
    x = torch.randn(job.rows, width, dtype=torch.bfloat16, device=device)
    dense = weight.exact()
    factor = dense.T if job.kind == "forward" else dense
    truth = x.double() @ factor.double()
    plain = ((x @ factor.to(x.dtype)).double() - truth).norm()
    error = (fused(job.kind, x, weight, tile).double() - truth).norm()
    return "" if error <= 2 * plain else f"error {float(error / truth.norm()):.2e}"
