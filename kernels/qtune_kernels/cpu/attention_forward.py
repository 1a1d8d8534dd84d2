"""Causal attention of packed samples: a row block's scores, weights and outputs, one after another.

The scores of 32 queries against all their keys wait in the cache in float32 until the greatest of
each row is known, so nothing is ever rescaled. Weights are exp(score - greatest), rounded to bf16
for the product with the values; their sums are taken before rounding, and divided by at the end
(FlashAttention, arXiv 2205.14135 and 2307.08691, for a cache where theirs is shared memory).
"""

from math import e, log2

from qtune_kernels.cpu import attention_tiles as parts
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_schedule import BLOCK
from qtune_kernels.cpu.attention_tiles import (
    NUMBERS_BYTES,
    SCORES_BYTES,
    SCORES_ROW,
    VECTORS_BYTES,
    WEIGHTS_BYTES,
    Arena,
    Matrix,
    Rows,
    Sample,
    rows_bytes,
)
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.math import exp2, to_bf16
from qtune_kernels.cpu.simd import F32, I64, Code, Value
from qtune_kernels.cpu.tiles import ROW_BYTES, TILE_BYTES


def scratch_bytes(blocks: int, width: int) -> int:
    """What a thread needs for samples of up to that many blocks."""
    keys = blocks * (2 * rows_bytes(width) + SCORES_BYTES + WEIGHTS_BYTES)
    return keys + 3 * rows_bytes(width) + 2 * VECTORS_BYTES + 2 * NUMBERS_BYTES


@kernel
def forward(
    code: KernelCode,
    y: Pointer,
    y_stride: Integer,
    maxima: Pointer,
    sums: Pointer,
    num_rows: Integer,
    q: Pointer,
    q_stride: Integer,
    q_head: Integer,
    k: Pointer,
    k_stride: Integer,
    k_head: Integer,
    v: Pointer,
    v_stride: Integer,
    v_head: Integer,
    scale: Number,
    window: Integer,
    tasks: Pointer,
    starts: Pointer,
    heads: Integer,
    scratch: Pointer,
    thread_bytes: Integer,
    blocks: Integer,
    *,
    width: int,
) -> None:
    """y [T, H, D] bf16 and, float32 [H, T], each row's greatest score, scaled, and sum of weights.

    Strides are in bytes; y's heads lie side by side. `heads` query heads share a key head.
    """
    arena = Arena(scratch + code.worker * thread_bytes)
    row_block = RowBlock(code, arena, blocks, scale, window, width)
    queries, outputs = Matrix(q, q_stride, q_head), Matrix(y, y_stride, code.integer(2 * width))
    sources = [Matrix(k, k_stride, k_head), Matrix(v, v_stride, v_head)]
    tiles.configure(code)
    last = code.load(starts + code.worker * 8 + 8, I64)
    with code.loop(last, code.load(starts + code.worker * 8, I64)) as task:
        row, length, head, first, stop = parts.task_fields(code, tasks, task)
        sample = Sample(code, row, length)
        with code.loop(stop, parts.first_key_block(code, first, window)) as block:
            row_block.take_keys(block, *(sample.rows(m, block, head // heads) for m in sources))
        with code.loop(head + heads, head) as now, code.loop(stop, first) as block:
            row_block.attend(block, sample.rows(queries, block, now))
            target = sample.rows(outputs, block, now)
            row_block.write(target)
            place = (now * num_rows + row + block * BLOCK) * 4
            row_block.write_statistics(target.height, maxima + place, sums + place)
    tiles.release(code)


class RowBlock:
    """Thirty-two queries, and the keys and values of their sample ready for products."""

    def __init__(
        self, code: Code, arena: Arena, blocks: Value, scale: Value, window: Value, width: int
    ) -> None:
        self._code, self._width, self._window = code, width, window
        self._scale = code.spread(scale * log2(e))
        size = rows_bytes(width)
        self._keys, self._values = (arena.take(blocks * size) for _ in range(2))
        self._scores = arena.take(blocks * SCORES_BYTES)
        self._weights = arena.take(blocks * WEIGHTS_BYTES)
        self._rows, self._out = arena.take(size), arena.take(2 * size)
        self._lanes, self._sums = (arena.take(VECTORS_BYTES) for _ in range(2))
        self._largest, self._total = (arena.take(NUMBERS_BYTES) for _ in range(2))

    def take_keys(self, block: Value, key: Rows, value: Rows) -> None:
        """Arrange a block of keys and of values."""
        code, width, at = self._code, self._width, block * rows_bytes(self._width)
        parts.stage(code, key, self._rows, width)
        parts.transposed(code, self._rows, self._keys + at, width)
        parts.stage(code, value, self._rows, width)
        parts.paired(code, self._rows, self._values + at, width)

    def attend(self, block: Value, query: Rows) -> None:
        """Compute the outputs of a block of queries, not yet divided by the sums of weights."""
        code, width = self._code, self._width
        parts.stage(code, query, self._rows, width)
        parts.fill(code, self._lanes, VECTORS_BYTES, parts.HIDDEN)
        parts.fill(code, self._sums, VECTORS_BYTES, 0.0)
        first = parts.first_key_block(code, block, self._window)
        with code.loop(block + 1, first) as other:
            self._score(block, other)
        for half, largest in enumerate(parts.fold(code, self._lanes, _larger)):
            code.store(largest * self._scale, self._largest + ROW_BYTES * half)
        with code.loop(block + 1, first) as other:
            self._weigh(other)
        for half, total in enumerate(parts.fold(code, self._sums, lambda a, b: a + b)):
            code.store(total, self._total + ROW_BYTES * half)
        with code.loop(width // BLOCK) as column:
            tiles.clear(code)
            with code.loop(block + 1, first) as other:
                values = self._values + other * rows_bytes(width) + column * (2 * TILE_BYTES)
                weights = self._weights + other * WEIGHTS_BYTES
                parts.multiply_add(code, weights, ROW_BYTES, values, TILE_BYTES)
            tiles.move_sums(code, tiles.store, self._out + column * SCORES_ROW, 4 * width)

    def write(self, target: Rows) -> None:
        """Write the outputs."""
        code = self._code

        def share(row: Value) -> Value:
            return 1.0 / parts.number(code, self._total, row)

        parts.write_rows(code, self._out, share, target, self._width)

    def write_statistics(self, count: Value, maxima: Value, sums: Value) -> None:
        """Write the rows' greatest scaled scores and their sums of weights."""
        code = self._code
        for half in range(2):
            at, live = ROW_BYTES * half, parts.live_lanes(code, count, half)
            largest = code.read(self._largest + at, F32) / log2(e)
            code.write(largest, maxima + at, F32, live)
            code.write(code.read(self._total + at, F32), sums + at, F32, live)

    def _score(self, block: Value, other: Value) -> None:
        """The scores of a block of keys, and the rows' greatest so far, lane by lane."""
        code = self._code
        scores = self._scores + other * SCORES_BYTES
        keys = self._keys + other * rows_bytes(self._width)
        parts.score(code, self._rows, keys, scores, self._width)
        ahead = (block - other) * BLOCK
        with code.when(parts.at_border(code, ahead, self._window)):
            parts.hide(code, scores, ahead, self._window)
        with code.loop(BLOCK) as row:
            low, high = (code.read(scores + row * SCORES_ROW + ROW_BYTES * h, F32) for h in (0, 1))
            largest = _larger(code.read(self._lanes + row * ROW_BYTES, F32), _larger(low, high))
            code.store(largest, self._lanes + row * ROW_BYTES)

    def _weigh(self, other: Value) -> None:
        """The weights of a block of keys, and the rows' sums so far, lane by lane."""
        code = self._code
        scores = self._scores + other * SCORES_BYTES
        weights = self._weights + other * WEIGHTS_BYTES
        with code.loop(BLOCK) as row:
            largest, at = parts.number(code, self._largest, row), row * ROW_BYTES
            start = scores + row * SCORES_ROW
            low, high = (
                exp2(code, code.fma(code.read(start + ROW_BYTES * h, F32), self._scale, -largest))
                for h in (0, 1)
            )
            code.store(code.read(self._sums + at, F32) + low + high, self._sums + at)
            code.store(to_bf16(code, low, high), weights + at)


def _larger(a: Value, b: Value) -> Value:
    return a.code.select(a > b, a, b)
