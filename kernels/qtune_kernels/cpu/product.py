"""The matrix products of `gemm.py` on tensors: when they can be used, and how they are cut.

A panel of the right factor has to stay in the second-level cache together with what streams past
it; a chunk of the left factor in the first-level cache. Many rows are shared among threads by rows,
which leaves each with the rows it made itself, at the price of decoding in every thread; few by
columns. Sums longer than `MAX_DEPTH` are made in pieces that are added up in float32.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtune_kernels.cpu import coded, team, tiles
from qtune_kernels.cpu.gemm import BLOCK, multiply
from qtune_kernels.cpu.groups import Layout
from qtune_kernels.cpu.tiles import DEPTH, SUMS, TILE_BYTES
from qtune_kernels.dequantize import Codes
from qtune_kernels.packing import SEGMENT
from qtune_kernels.scratch import scratch

PANEL_BYTES = 1 << 20
# 32 rows of so many steps take 36 KB
CHUNK_STEPS = 18
MAX_DEPTH = 4096
# rows for each thread from which it is worth decoding everything in all of them
ROWS_TO_SPLIT = 512


class Narrow(NamedTuple):
    """A matrix of float32 [n, m] times a factor; where 32 are needed of n or m, zeros follow."""

    matrix: Tensor
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix as it is."""
        return self.matrix.shape[0], self.matrix.shape[1]


class Extension(NamedTuple):
    """A second pair of factors: `left`, bf16 [T, 32], and `right` lying as the first pair's."""

    left: Tensor
    right: Narrow


Right = Codes | Tensor | Narrow


def multiplies(left: Tensor, right: Right) -> bool:
    """Whether `product` takes these factors: bf16 on a processor with AMX, sizes in blocks."""
    if left.dtype != torch.bfloat16 or not left.is_cpu or not tiles.available():
        return False
    if isinstance(right, Tensor):
        fits = right.dtype == torch.bfloat16 and right.stride(1) == 1
        return fits and right.shape[0] % BLOCK == right.shape[1] % BLOCK == 0
    if isinstance(right, Narrow):
        return min(right.shape) <= DEPTH and max(right.shape) % DEPTH == 0
    fits = right.shape[0] % BLOCK == right.shape[1] % SEGMENT == 0
    return fits and coded.decodes(_layout(right))


def product(
    left: Tensor,
    right: Right,
    *,
    outputs_first: bool,
    bias: Tensor | None = None,
    extension: Extension | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """left [T, K] times right, [T, N] in bf16 or float32, in `out` if that is given.

    `right` lies as [N, K] if `outputs_first`, else as [K, N]. `bias` is bf16 [N].
    """
    # the first call asks the system for the registers; without them the process would be killed
    assert tiles.available()
    num_rows = left.shape[0]
    depth, columns = reversed(right.shape) if outputs_first else right.shape
    if isinstance(right, Narrow):
        columns = DEPTH
    left = _rows(left, depth > MAX_DEPTH)
    if extension is not None:
        extension = Extension(_rows(extension.left, depth > MAX_DEPTH), extension.right)
    if depth > MAX_DEPTH:
        made = _long_product(left, right, columns, outputs_first, extension)
        made = (made if bias is None else made.add_(bias)).to(dtype)
    else:
        fits = len(left) == num_rows
        made = out if out is not None and fits else left.new_empty(len(left), columns, dtype=dtype)
        _multiply(made, left, right, 0, outputs_first, bias, extension)
    if made is out:
        return out
    return made[:num_rows] if out is None else out.copy_(made[:num_rows])


def _long_product(
    left: Tensor,
    right: Right,
    columns: int,
    outputs_first: bool,
    extension: Extension | None,
) -> Tensor:
    """The product in float32, in pieces of `MAX_DEPTH`."""
    out = left.new_empty(left.shape[0], columns, dtype=torch.float32)
    for first in range(0, left.shape[1], MAX_DEPTH):
        piece = left[:, first : first + MAX_DEPTH]
        last = first + MAX_DEPTH >= left.shape[1]
        extra = extension if last else None
        _multiply(out, piece, right, first, outputs_first, None, extra, accumulate=first > 0)
    return out


def _rows(left: Tensor, accumulates: bool) -> Tensor:
    """Rows as the kernel takes them: at least a block, whole blocks where sums are added to."""
    missing = max(0, BLOCK - left.shape[0])
    if accumulates:
        missing = -left.shape[0] % BLOCK
    if missing:
        return torch.nn.functional.pad(left, (0, 0, 0, missing))
    return left if left.stride(1) == 1 else left.contiguous()


def _multiply(
    out: Tensor,
    left: Tensor,
    right: Right,
    first: int,
    outputs_first: bool,
    bias: Tensor | None,
    extension: Extension | None,
    accumulate: bool = False,
) -> None:
    (rows, depth), columns = left.shape, out.shape[1]
    workers = team.num_workers()
    cut = _cut(rows, depth, columns, extension is not None, workers)
    panels = scratch("panels", workers * cut.panel_bytes, torch.uint8)
    narrow = extension.right if extension else right if isinstance(right, Narrow) else None
    multiply(
        out.data_ptr(),
        out.stride(0) * out.itemsize,
        rows,
        columns,
        depth,
        left.data_ptr(),
        left.stride(0) * 2,
        extension.left.data_ptr() if extension else 0,
        *_right(right),
        first,
        *_narrow(narrow),
        0 if bias is None else bias.data_ptr(),
        *_scales(right),
        panels.data_ptr(),
        cut.panel_bytes,
        cut.panel_blocks,
        cut.chunk_steps,
        **_kind(right),
        outputs_first=outputs_first,
        extended=extension is not None,
        biased=bias is not None,
        wide=out.dtype == torch.float32,
        accumulate=accumulate,
        by_rows=cut.by_rows,
    )


class _Cut(NamedTuple):
    """How a product is cut, see the top of this file."""

    by_rows: bool
    panel_blocks: int
    panel_bytes: int
    chunk_steps: int


@lru_cache(maxsize=1024)
def _cut(rows: int, depth: int, columns: int, extended: bool, workers: int) -> _Cut:
    steps, blocks = depth // DEPTH, columns // BLOCK
    by_rows = rows >= ROWS_TO_SPLIT * workers or blocks < 2 * workers
    own = blocks if by_rows else -(-blocks // workers)
    most = max(1, PANEL_BYTES // (2 * (steps + extended) * TILE_BYTES))
    # equal panels, as few as the cache allows, and equal chunks
    panel_blocks = -(-own // -(-own // most))
    panel_bytes = panel_blocks * (2 * (steps + extended) + len(SUMS)) * TILE_BYTES
    chunk_steps = -(-steps // -(-steps // CHUNK_STEPS))
    return _Cut(by_rows, panel_blocks, panel_bytes, chunk_steps)


def _kind(right: Right) -> dict[str, Any]:
    """What the kernel is compiled for."""
    if isinstance(right, Codes):
        return {"kind": "codes", "layout": _layout(right)}
    return {"kind": "dense" if isinstance(right, Tensor) else "narrow", "layout": None}


def _layout(right: Codes) -> Layout:
    return coded.layout(right.scales, right.levels, right.group_size)


def _right(right: Right) -> tuple[int, int]:
    """Address and stride of the right factor."""
    if isinstance(right, Codes):
        return right.packed.data_ptr(), right.shape[1]
    return (right.data_ptr(), right.stride(0) * 2) if isinstance(right, Tensor) else (0, 0)


def _narrow(narrow: Narrow | None) -> tuple[int, int, int, float]:
    """Address, rows, columns and factor."""
    if narrow is None:
        return 0, 0, 0, 0.0
    return narrow.matrix.data_ptr(), *narrow.shape, narrow.factor


def _scales(right: Right) -> tuple[int, ...]:
    """What decodes codes: the places of a quantized matrix behind that of its codes."""
    if not isinstance(right, Codes):
        return (0,) * 7
    return coded.places(right.packed, right.scales, right.levels)[1:]
