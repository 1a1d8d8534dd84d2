"""What the attention kernels are made of: blocks of 32 rows on their way into and out of AMX.

Every block passes through a copy in which rows beyond the sample are zero, so nothing outside the
tensors is touched and all that follows is whole. The right factor of a product is made of tiles of
1 KiB as in `tiles.py`; three arrangements of the same 32 rows serve as factors:

    transposed  rows^T on the right: q K^T
    paired      the rows themselves on the right: P V
    columns     rows^T on the left: dS^T q, as its transpose q^T dS
"""

from collections.abc import Callable
from typing import NamedTuple

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_schedule import BLOCK, TASK_BYTES
from qtune_kernels.cpu.gemm import PAIRS, WORDS
from qtune_kernels.cpu.jit import KernelCode
from qtune_kernels.cpu.math import to_bf16
from qtune_kernels.cpu.simd import F32, I32, I64, Code, Value, vector
from qtune_kernels.cpu.tiles import (
    DEPTH,
    HIGH_PAIRS,
    LEFT,
    LOW_PAIRS,
    RIGHT,
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
)

# a block of scores in float32 and in bf16, and one of its rows in float32
SCORES_BYTES, WEIGHTS_BYTES = 4 * TILE_BYTES, 2 * TILE_BYTES
SCORES_ROW = 4 * BLOCK
# a number for each row of a block, and a vector for each
NUMBERS_BYTES, VECTORS_BYTES = 4 * BLOCK, ROW_BYTES * BLOCK
# what a hidden score is, far below any that is seen and yet finite
HIDDEN = -1e30


def rows_bytes(width: int) -> int:
    """Bytes of 32 rows in bf16, however they are arranged."""
    return 2 * BLOCK * width


class Arena:
    """A thread's scratch memory, handed out piece by piece."""

    def __init__(self, start: Value) -> None:
        self._next = start

    def take(self, num_bytes: Value | int) -> Value:
        """The address of the next piece."""
        piece = self._next
        self._next = piece + num_bytes
        return piece


class Rows(NamedTuple):
    """Up to 32 rows in memory: the first one's address, bytes to the next, and how many."""

    start: Value
    stride: Value
    height: Value


class Matrix(NamedTuple):
    """A tensor [T, heads, D] that lies anyhow but for whole rows: address, and strides in bytes."""

    start: Value
    row_stride: Value
    head_stride: Value


class Sample:
    """A sample's rows of tensors [T, heads, D], a block at a time."""

    def __init__(self, code: Code, first: Value, length: Value) -> None:
        self._code, self._first, self._length = code, first, length

    def rows(self, matrix: Matrix, block: Value, head: Value) -> Rows:
        """A head's rows of a block, the last of which may be short."""
        at = block * BLOCK
        height = self._code.smaller(self._length - at, BLOCK)
        row = matrix.start + (self._first + at) * matrix.row_stride
        return Rows(row + head * matrix.head_stride, matrix.row_stride, height)


def task_fields(code: KernelCode, tasks: Value, number: Value) -> list[Value]:
    """The fields of a `Task`, i64."""
    start = tasks + number * TASK_BYTES
    return [code.load(start + at, I64) for at in range(0, TASK_BYTES, 8)]


def stage(code: Code, rows: Rows, target: Value, width: int) -> None:
    """Copy rows to a block of 32, in which the others are zero."""
    places = range(0, 2 * width, ROW_BYTES)
    with code.loop(rows.height) as row:
        start = rows.start + row * rows.stride
        for at in places:
            code.store(code.load(start + at, WORDS), target + row * (2 * width) + at)
    with code.loop(BLOCK, rows.height) as row:
        for at in places:
            code.store(code.value(0, WORDS), target + row * (2 * width) + at)


def transposed(code: Code, rows: Value, target: Value, width: int) -> None:
    """Tiles [two of 16 rows, steps of 32 columns] of a block's transpose, for the right."""
    steps = width // DEPTH
    for half in range(2):
        with code.loop(steps) as step:
            start = rows + step * ROW_BYTES + half * SIDE * 2 * width
            words = [code.load(start + 2 * width * i, PAIRS) for i in range(SIDE)]
            tile = target + (step + half * steps) * TILE_BYTES
            for i, pairs in enumerate(tiles.transpose(words)):
                code.store(pairs, tile + ROW_BYTES * i)


def paired(code: Code, rows: Value, target: Value, width: int) -> None:
    """Tiles [sixteens of columns] of a block, for the right."""
    _pair(code, rows, target, width, lambda pairs: pairs)


def columns(code: Code, rows: Value, target: Value, width: int) -> None:
    """Tiles [sixteens of columns] of a block's transpose, for the left."""
    _pair(code, rows, target, width, tiles.transpose)


def _pair(
    code: Code,
    rows: Value,
    target: Value,
    width: int,
    arrange: Callable[[list[Value]], list[Value]],
) -> None:
    with code.loop(width // DEPTH) as step:
        start = rows + step * ROW_BYTES
        both = [
            [code.load(start + 2 * width * (2 * i + odd), WORDS) for odd in range(2)]
            for i in range(SIDE)
        ]
        for half, lanes in enumerate((LOW_PAIRS, HIGH_PAIRS)):
            pairs = [even.shuffle(odd, lanes).bits(PAIRS) for even, odd in both]
            for i, row in enumerate(arrange(pairs)):
                code.store(row, target + (step * 2 + half) * TILE_BYTES + ROW_BYTES * i)


def multiply_add(code: Code, left: Value, stride: int, right: Value, gap: int) -> None:
    """Add [32, 32] [32, 32] to the sums: rows of `left` and tiles of `right` lie so far apart."""
    for half, tile in enumerate(LEFT):
        tiles.load(code, tile, left + stride * SIDE * half, code.integer(stride))
    for half, tile in enumerate(RIGHT):
        tiles.load(code, tile, right + gap * half, code.integer(ROW_BYTES))
    tiles.multiply_block(code)


def open_sums(code: Code, block: Value, *, fresh: Value) -> None:
    """Begin the sums of a block [32, 32] at zero if they are `fresh`, else where they were left."""
    with code.when(fresh):
        tiles.clear(code)
    with code.when(fresh.equals(0)):
        tiles.move_sums(code, tiles.load, block, SCORES_ROW)


def score(code: Code, rows: Value, others: Value, target: Value, width: int) -> None:
    """A block of rows times others^T, `transposed`: [32, 32] float32."""
    steps = width // DEPTH
    tiles.clear(code)
    for step in range(steps):
        at = others + TILE_BYTES * step
        multiply_add(code, rows + ROW_BYTES * step, 2 * width, at, TILE_BYTES * steps)
    tiles.move_sums(code, tiles.store, target, SCORES_ROW)


def hide(code: Code, scores: Value, ahead: Value, window: Value) -> None:
    """Hide keys that come after their query or `window` before it.

    The block's first query is `ahead` of its first key.
    """
    with code.loop(BLOCK) as row:
        nearest = code.spread((row + ahead).to(I32))
        for half in range(2):
            keys = code.constants(range(SIDE * half, SIDE * (half + 1)), I32)
            far = (keys + code.spread(window.to(I32))) > nearest
            seen = far & (keys < nearest + 1)
            at = scores + row * SCORES_ROW + ROW_BYTES * half
            code.store(code.select(seen, code.load(at, vector(F32)), HIDDEN), at)


def at_border(code: Code, ahead: Value, window: Value) -> Value:
    """Whether a block has anything to hide, i1."""
    return ahead.equals(0) | (ahead + BLOCK > window)


def first_key_block(code: Code, query_block: Value, window: Value) -> Value:
    """The first block of which a block of queries sees anything."""
    reach = query_block * BLOCK + 1
    return (reach - code.smaller(window, reach)) // BLOCK


def query_blocks_end(key_block: Value, window: Value) -> Value:
    """After the last block of queries of which any sees that block of keys."""
    return (key_block * BLOCK + (BLOCK - 1) + window + (BLOCK - 1)) // BLOCK


def live_lanes(code: Code, count: Value, half: int) -> Value:
    """Which of 16 rows of a half of a block, i1, are before `count`."""
    start = code.integer(SIDE * half)
    return code.first_lanes(count - code.smaller(start, count))


def fold(code: Code, table: Value, combine: Callable[[Value, Value], Value]) -> list[Value]:
    """Lanes combined for each of 32 vectors: two vectors of 16 results."""
    results = []
    for half in range(2):
        rows = [code.read(table + ROW_BYTES * (SIDE * half + i), F32) for i in range(SIDE)]
        rows = tiles.transpose(rows)
        while len(rows) > 1:
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows = [combine(one, other) for one, other in pairs]
        results += rows
    return results


def number(code: Code, table: Value, row: Value) -> Value:
    """The row's number in every lane."""
    return code.spread(code.load(table + row * 4, F32))


def fill(code: Code, address: Value, num_bytes: Value | int, filler: float) -> None:
    """Set float32 in whole vectors."""
    with code.loop(num_bytes, 0, ROW_BYTES) as at:
        code.store(code.value(filler, vector(F32)), address + at)


def write_rows(
    code: Code,
    block: Value,
    factors: Callable[[Value], Value | float],
    target: Rows,
    width: int,
    *,
    wide: bool = False,
) -> None:
    """Write the first rows of a block [32, D] of float32, times a factor for each row."""
    element = 4 if wide else 2
    with code.loop(target.height) as row:
        factor = factors(row)
        for column in range(0, width, DEPTH):
            start = block + row * (4 * width) + 4 * column
            parts = [code.read(start + ROW_BYTES * half, F32) * factor for half in range(2)]
            out = target.start + row * target.stride + element * column
            if wide:
                for half, part in enumerate(parts):
                    code.store(part, out + ROW_BYTES * half)
            else:
                code.store(to_bf16(code, *parts), out)
