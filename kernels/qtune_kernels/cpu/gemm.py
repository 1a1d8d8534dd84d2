"""Products with a matrix that is decoded into the cache and never exists in memory.

out [T, N] = left [T, K] right [K, N] + left2 [T, 32] narrow [32, N], in bf16, summed in float32 by
AMX. A thread decodes a panel of columns into tiles of its own (`tiles.py`), small enough for the
second-level cache, and multiplies all rows with it: a weight is decoded once for each product. The
second pair of factors is one more step of the same sums, so a LoRA adapter costs no pass over
`out`.

The right factors may lie as [N, K] (y = x W^T) or as [K, N] (dx = dy W). The first is of codes or
of bf16; the second, of float32 and filled up with zeros to 32, may also stand in its place.
"""

from typing import NamedTuple

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.groups import Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.math import to_bf16
from qtune_kernels.cpu.simd import BF16, F32, I16, I32, Code, Value, vector
from qtune_kernels.cpu.stored import Bounded, Coded, Dense, Stored
from qtune_kernels.cpu.tiles import (
    DEPTH,
    HIGH_PAIRS,
    LEFT,
    LOW_PAIRS,
    RIGHT,
    ROW_BYTES,
    SIDE,
    SUMS,
    TILE_BYTES,
)

# rows and columns of `out` made at a time, in four registers of sums
BLOCK = 2 * SIDE
# bytes of a row of a block's sums while they wait or are rounded
SUMS_ROW = 4 * BLOCK
WORDS, PAIRS = vector(I16, DEPTH), vector(I32)


@kernel
def multiply(
    code: KernelCode,
    out: Pointer,
    out_stride: Integer,
    num_rows: Integer,
    num_columns: Integer,
    depth: Integer,
    left: Pointer,
    left_stride: Integer,
    left2: Pointer,
    right: Pointer,
    right_stride: Integer,
    first: Integer,
    narrow: Pointer,
    narrow_rows: Integer,
    narrow_columns: Integer,
    narrow_factor: Number,
    bias: Pointer,
    scale_codes: Pointer,
    scale_scales: Pointer,
    scale_offset: Pointer,
    zeros: Pointer,
    scale_map: Pointer,
    levels: Pointer,
    num_groups: Integer,
    panels: Pointer,
    panel_bytes: Integer,
    panel_blocks: Integer,
    chunk_steps: Integer,
    *,
    kind: str,
    layout: Layout | None,
    outputs_first: bool,
    extended: bool,
    biased: bool,
    wide: bool,
    accumulate: bool,
    by_rows: bool,
) -> None:
    """At least 32 rows, columns and depth in multiples of 32.

    Strides are in bytes, that of codes in weights; `depth` elements of a longer sum begin at
    `first` of `right`, whose `kind` is codes, dense or narrow. `outputs_first` says that the right
    factors lie as [N, K], `wide` that `out` is float32. `by_rows` shares rows among threads and not
    columns.
    """
    steps = depth // DEPTH
    bounded = Bounded(code, narrow, narrow_rows, narrow_columns, narrow_factor)
    main: Stored = bounded
    if kind == "dense":
        main = Dense(code, right, right_stride)
    elif layout is not None:
        scales = (scale_codes, scale_scales, scale_offset, zeros, scale_map)
        places = Places(right, *scales, levels, num_groups)
        main = Coded(Packed(code, places, layout), right_stride)
    lefts = Lefts(left, left_stride, steps, chunk_steps, left2 if extended else None)
    panel = Panel(code, panels + code.worker * panel_bytes, steps + int(extended), outputs_first)
    waiting, _ = panel.tiles(panel_blocks, code.integer(0))
    added = bias if biased else None
    sums = Sums(code, waiting, out, out_stride, added, wide=wide, accumulate=accumulate)
    row_blocks, column_blocks = (num_rows + (BLOCK - 1)) // BLOCK, num_columns // BLOCK
    everything = code.integer(0)
    rows = code.part(row_blocks) if by_rows else (everything, row_blocks)
    columns = (everything, column_blocks) if by_rows else code.part(column_blocks)
    tiles.configure(code)
    with code.loop(columns[1], columns[0], panel_blocks) as begin:
        width = code.smaller(columns[1] - begin, panel_blocks)
        panel.fill(main, first, begin, width, everything, steps)
        if extended:
            panel.fill(bounded, everything, begin, width, steps, code.integer(1))
        with code.loop(rows[1], rows[0]) as block:
            # the last rows are done as a full block, some of them for the second time
            row = code.smaller(block * BLOCK, num_rows - BLOCK)
            _row_of_blocks(code, lefts, panel, sums, row, begin, width)
    tiles.release(code)


class Lefts(NamedTuple):
    """The left factor, how its sums are cut, and the left factor of the second pair if any."""

    start: Value
    stride: Value
    steps: Value
    chunk_steps: Value
    second: Value | None


def _row_of_blocks(
    code: Code, lefts: Lefts, panel: "Panel", sums: "Sums", row: Value, begin: Value, width: Value
) -> None:
    """Thirty-two rows of `out` within a panel: chunk by chunk, block by block."""
    row_bytes = code.integer(ROW_BYTES)
    factor = lefts.start + row * lefts.stride
    with code.loop(lefts.steps, 0, lefts.chunk_steps) as start, code.loop(width) as column:
        sums.open(row, begin, column, start.equals(0))
        stop = code.smaller(start + lefts.chunk_steps, lefts.steps)
        with code.loop(stop, start) as step:
            _step(code, factor + step * ROW_BYTES, lefts.stride, panel, column, step)
        last = stop.equals(lefts.steps)
        if lefts.second is not None:
            with code.when(last):
                _step(code, lefts.second + row * ROW_BYTES, row_bytes, panel, column, stop)
        sums.close(row, begin, column, last)


class Sums:
    """The sums of a block, in registers; between chunks of a long sum they wait in the cache."""

    def __init__(
        self,
        code: Code,
        waiting: Value,
        out: Value,
        stride: Value,
        bias: Value | None,
        *,
        wide: bool,
        accumulate: bool,
    ) -> None:
        self._code, self._waiting, self._out, self._stride = code, waiting, out, stride
        self._bias, self._wide, self._accumulate = bias, wide, accumulate
        self._rounding = code.stack(len(SUMS) * TILE_BYTES)

    def open(self, row: Value, begin: Value, column: Value, first: Value) -> None:
        """Start the sums of a block, or take up those of the chunk before."""
        code = self._code
        with code.when(first):
            if self._accumulate:
                target = self._target(row, begin + column)
                tiles.move_sums(code, tiles.load, target, self._stride)
            else:
                tiles.clear(code)
        with code.when(first.equals(0)):
            tiles.move_sums(code, tiles.load, self._place(column), SUMS_ROW)

    def close(self, row: Value, begin: Value, column: Value, last: Value) -> None:
        """Write the sums of a block to `out`, or put them aside for the next chunk."""
        code = self._code
        with code.when(last):
            target = self._target(row, begin + column)
            if self._wide:
                tiles.move_sums(code, tiles.store, target, self._stride)
            else:
                self._store_rounded(target, begin + column)
        with code.when(last.equals(0)):
            tiles.move_sums(code, tiles.store, self._place(column), SUMS_ROW)

    def _place(self, column: Value) -> Value:
        """Where the sums of a block wait."""
        return self._waiting + column * (len(SUMS) * TILE_BYTES)

    def _target(self, row: Value, column: Value) -> Value:
        element = 4 if self._wide else 2
        return self._out + row * self._stride + column * (BLOCK * element)

    def _store_rounded(self, target: Value, column: Value) -> None:
        code = self._code
        tiles.move_sums(code, tiles.store, self._rounding, SUMS_ROW)
        at = None if self._bias is None else self._bias + column * (2 * BLOCK)
        bias = [code.read(at + ROW_BYTES // 2 * half, BF16) for half in range(2)] if at else []
        for row in range(BLOCK):
            place = self._rounding + row * SUMS_ROW
            halves = [code.read(place + ROW_BYTES * half, F32) for half in range(2)]
            if bias:
                halves = [half + more for half, more in zip(halves, bias, strict=True)]
            code.store(to_bf16(code, *halves), target + self._stride * row)


class Panel:
    """Columns of the right factor as tiles in the cache: [columns / 32, steps, 2] of 1 KiB.

    `transposed` says that the right factors lie as [N, K].
    """

    def __init__(self, code: Code, start: Value, steps: Value, transposed: bool) -> None:
        self._code, self._start, self._steps = code, start, steps
        self._transposed = transposed

    def tiles(self, block: Value, step: Value) -> list[Value]:
        """The addresses of a block's two tiles for one step; the next step's follow them."""
        start = self._start + (block * self._steps + step) * (2 * TILE_BYTES)
        return [start, start + TILE_BYTES]

    def fill(
        self, stored: Stored, first: Value, begin: Value, width: Value, at: Value, steps: Value
    ) -> None:
        """Make the tiles of `width` blocks from `begin` on, for `steps` steps from step `at` on.

        `first` is where the sum begins in the matrix. It is read along its rows.
        """
        code = self._code
        make = self._make_transposed if self._transposed else self._make
        counts = (width, steps) if self._transposed else (steps, width)
        with code.loop(counts[0]) as outer, code.loop(counts[1]) as inner:
            block, step = (outer, inner) if self._transposed else (inner, outer)
            targets = self.tiles(block, at + step)
            make(stored, first + step * DEPTH, (begin + block) * BLOCK, targets)

    def _make(self, stored: Stored, k: Value, n: Value, targets: list[Value]) -> None:
        """Two tiles of a matrix [K, N]: pairs of rows are interleaved."""
        for pair in range(SIDE):
            words = [stored.read(k + (2 * pair + odd), n).bits(WORDS) for odd in range(2)]
            for lanes, target in zip((LOW_PAIRS, HIGH_PAIRS), targets, strict=True):
                self._code.store(words[0].shuffle(words[1], lanes), target + ROW_BYTES * pair)

    def _make_transposed(self, stored: Stored, k: Value, n: Value, targets: list[Value]) -> None:
        """Two tiles of a matrix that lies as [N, K]."""
        for half, target in enumerate(targets):
            rows = [stored.read(n + (SIDE * half + i), k).bits(PAIRS) for i in range(SIDE)]
            for i, pairs in enumerate(tiles.transpose(rows)):
                self._code.store(pairs, target + ROW_BYTES * i)


def _step(code: Code, left: Value, stride: Value, panel: Panel, column: Value, step: Value) -> None:
    """Thirty-two products more for each sum."""
    for half, tile in enumerate(LEFT):
        tiles.load(code, tile, left + stride * (SIDE * half), stride)
    for tile, address in zip(RIGHT, panel.tiles(column, step), strict=True):
        tiles.load_passing(code, tile, address, code.integer(ROW_BYTES))
    tiles.multiply_block(code)
