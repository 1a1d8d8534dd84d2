"""The gradients of causal attention, for one key head of one sample at a time.

With P = exp(scale q k^T - lse), dP = dy v^T, delta = rowsum(P dP) and dS = P (dP - delta),

    dq = scale dS k    dk = scale dS^T q    dv = P^T dy

(FlashAttention-2, arXiv 2307.08691). There delta is rowsum(dy y), which spares a pass over P and
dP; but y is rounded to bf16, and where few keys have all the weight that error is several times as
large as all others. Here a row block of P and dP fits in the cache, and delta is exact.

P and dS of a chunk of queries are rounded to bf16 and wait in the cache, so that the sums over
queries stay in registers for a whole chunk. Those sums are taken as dk^T and dv^T, which spares P
and dS a transpose.
"""

from math import e, log2

from qtune_kernels.cpu import attention_tiles as parts
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_keys import Keys
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
from qtune_kernels.cpu.gemm import WORDS
from qtune_kernels.cpu.jit import Integer, KernelCode, Number, Pointer, kernel
from qtune_kernels.cpu.math import exp2, to_bf16
from qtune_kernels.cpu.simd import F32, I64, Code, Value
from qtune_kernels.cpu.tiles import DEPTH, HIGH_PAIRS, LOW_PAIRS, ROW_BYTES, TILE_BYTES

# the logarithm of no weight at all, finite
NOTHING = -1e30


def scratch_bytes(blocks: int, chunk: int, width: int) -> int:
    """What a thread needs for samples of up to `blocks` blocks, in chunks of up to `chunk`."""
    size = rows_bytes(width)
    keys = blocks * (3 * size + 2 * 2 * size + WEIGHTS_BYTES + 2 * SCORES_BYTES)
    queries = chunk * (2 * size + blocks * 2 * WEIGHTS_BYTES)
    return keys + queries + 7 * size + VECTORS_BYTES + 2 * NUMBERS_BYTES


@kernel
def backward(
    code: KernelCode,
    dq: Pointer,
    dq_stride: Integer,
    dk: Pointer,
    dv: Pointer,
    dk_stride: Integer,
    dy: Pointer,
    dy_stride: Integer,
    dy_head: Integer,
    q: Pointer,
    q_stride: Integer,
    q_head: Integer,
    k: Pointer,
    k_stride: Integer,
    k_head: Integer,
    v: Pointer,
    v_stride: Integer,
    v_head: Integer,
    lse: Pointer,
    num_rows: Integer,
    scale: Number,
    window: Integer,
    tasks: Pointer,
    starts: Pointer,
    heads: Integer,
    group: Integer,
    chunk: Integer,
    scratch: Pointer,
    thread_bytes: Integer,
    blocks: Integer,
    *,
    width: int,
    wide: bool,
) -> None:
    """dq [T, H, D], dk and dv [T, K, D], bf16.

    Strides are in bytes; heads of gradients lie side by side. `group` query heads share a key head.
    A task has `heads` of them; if not all, dk and dv are `wide`: float32 sums of each task, side by
    side, dk not yet scaled.
    """
    arena = Arena(scratch + code.worker * thread_bytes)
    keys = Keys(code, arena, blocks, width)
    queries = Queries(code, arena, keys, blocks, chunk, scale, window)
    inputs = [Matrix(q, q_stride, q_head), Matrix(dy, dy_stride, dy_head)]
    dq_rows = Matrix(dq, dq_stride, code.integer(2 * width))
    sources = [Matrix(k, k_stride, k_head), Matrix(v, v_stride, v_head)]
    side = code.integer((4 if wide else 2) * width)
    gradients = [Matrix(dk, dk_stride, side), Matrix(dv, dk_stride, side)]
    factors = [code.value(1.0, F32) if wide else scale, code.value(1.0, F32)]
    tiles.configure(code)
    last = code.load(starts + code.worker * 8 + 8, I64)
    with code.loop(last, code.load(starts + code.worker * 8, I64)) as task:
        row, length, head, _, stop = parts.task_fields(code, tasks, task)
        sample = Sample(code, row, length)
        with code.loop(stop) as block:
            keys.take(block, *(sample.rows(m, block, head // group) for m in sources))
        with code.loop(heads) as turn:
            now = head + turn
            with code.loop(stop, 0, chunk) as begin:
                end = code.smaller(begin + chunk, stop)
                with code.loop(end, begin) as block:
                    queries.take(block - begin, *(sample.rows(m, block, now) for m in inputs))
                    target = sample.rows(dq_rows, block, now)
                    place = (now * num_rows + row + block * BLOCK) * 4
                    queries.take_lse(lse + place, target.height)
                    queries.weigh(block - begin, block)
                    queries.write(block, target)
                queries.sum_keys(begin, end, first=turn.equals(0))
        with code.loop(stop) as block:
            for number, (matrix, factor) in enumerate(zip(gradients, factors, strict=True)):
                rows = sample.rows(matrix, block, head // heads)
                keys.write(number, block, factor, rows, wide=wide)
    tiles.release(code)


class Queries:
    """A chunk of queries of one head: their rows, weights and gradients of scores."""

    def __init__(
        self,
        code: Code,
        arena: Arena,
        keys: Keys,
        blocks: Value,
        chunk: Value,
        scale: Value,
        window: Value,
    ) -> None:
        self._code, self._keys, self._width, self._blocks = code, keys, keys.width, blocks
        self._scale, self._window = scale, window
        self._exponent = code.spread(scale * log2(e))
        size = rows_bytes(self._width)
        self._q_columns, self._dy_columns = (arena.take(chunk * size) for _ in range(2))
        self._weights, self._ds = (arena.take(chunk * blocks * WEIGHTS_BYTES) for _ in range(2))
        self._ds_rows = arena.take(blocks * WEIGHTS_BYTES)
        self._q, self._dy, self._out = arena.take(size), arena.take(size), arena.take(2 * size)
        self._p, self._dp = (arena.take(blocks * SCORES_BYTES) for _ in range(2))
        self._lanes = arena.take(VECTORS_BYTES)
        self._shift, self._delta = (arena.take(NUMBERS_BYTES) for _ in range(2))

    def take(self, place: Value, query: Rows, dy: Rows) -> None:
        """Arrange a block of queries and of the gradients of their outputs."""
        code, at = self._code, place * rows_bytes(self._width)
        for rows, block, target in (
            (query, self._q, self._q_columns),
            (dy, self._dy, self._dy_columns),
        ):
            parts.stage(code, rows, block, self._width)
            parts.columns(code, block, target + at, self._width)

    def take_lse(self, lse: Value, count: Value) -> None:
        """Read the block's lse; rows beyond the sample get no weight."""
        code = self._code
        for half in range(2):
            at, live = ROW_BYTES * half, parts.live_lanes(code, count, half)
            shift = code.read(lse + at, F32, live) * -log2(e)
            code.store(code.select(live, shift, NOTHING), self._shift + at)

    def weigh(self, place: Value, block: Value) -> None:
        """Compute weights and gradients of scores of a block against all keys it sees."""
        code = self._code
        first = parts.first_key_block(code, block, self._window)
        parts.fill(code, self._lanes, VECTORS_BYTES, 0.0)
        with code.loop(block + 1, first) as other:
            self._weigh(block, other)
        for half, delta in enumerate(parts.fold(code, self._lanes, lambda a, b: a + b)):
            code.store(delta, self._delta + ROW_BYTES * half)
        with code.loop(block + 1, first) as other:
            at = (place * self._blocks + other) * WEIGHTS_BYTES
            with code.loop(BLOCK, 0, 2) as row:
                self._round_rows(row, other, at + row * (ROW_BYTES // 2))

    def _weigh(self, block: Value, other: Value) -> None:
        """P and dP of a block of keys in float32, and the rows' sums of P dP, lane by lane."""
        code, ahead = self._code, (block - other) * BLOCK
        weights, dp = (start + other * SCORES_BYTES for start in (self._p, self._dp))
        parts.score(code, self._q, self._keys.scoring(other), weights, self._width)
        parts.score(code, self._dy, self._keys.valuing(other), dp, self._width)
        with code.when(parts.at_border(code, ahead, self._window)):
            parts.hide(code, weights, ahead, self._window)
        with code.loop(BLOCK) as row:
            shift, lanes = parts.number(code, self._shift, row), self._lanes + row * ROW_BYTES
            total = code.read(lanes, F32)
            for at in (row * SCORES_ROW, row * SCORES_ROW + ROW_BYTES):
                p = exp2(code, code.fma(code.read(weights + at, F32), self._exponent, shift))
                code.store(p, weights + at)
                total = code.fma(p, code.read(dp + at, F32), total)
            code.store(total, lanes)

    def _round_rows(self, row: Value, other: Value, at: Value) -> None:
        """P and dS of two rows in bf16: they are neighbours in the tiles of pairs."""
        code = self._code
        weights, gradients = [], []
        for now in (row, row + 1):
            delta, start = parts.number(code, self._delta, now), other * SCORES_BYTES
            start = start + now * SCORES_ROW
            p, dp = (
                [code.read(block + start + half, F32) for half in (0, ROW_BYTES)]
                for block in (self._p, self._dp)
            )
            ds = [weight * (dweight - delta) for weight, dweight in zip(p, dp, strict=True)]
            weights.append(to_bf16(code, *p).bits(WORDS))
            gradients.append(to_bf16(code, *ds).bits(WORDS))
            target = self._ds_rows + other * WEIGHTS_BYTES + now * ROW_BYTES
            code.store(gradients[-1], target)
        for (even, odd), target in ((weights, self._weights), (gradients, self._ds)):
            for half, lanes in enumerate((LOW_PAIRS, HIGH_PAIRS)):
                code.store(even.shuffle(odd, lanes), target + at + TILE_BYTES * half)

    def write(self, block: Value, target: Rows) -> None:
        """Compute and write a block's dq."""
        code, width = self._code, self._width
        first = parts.first_key_block(code, block, self._window)
        with code.loop(width // DEPTH) as column:
            tiles.clear(code)
            with code.loop(block + 1, first) as other:
                rows = self._ds_rows + other * WEIGHTS_BYTES
                parts.multiply_add(
                    code, rows, ROW_BYTES, self._keys.paired(other, column), TILE_BYTES
                )
            tiles.move_sums(code, tiles.store, self._out + column * SCORES_ROW, 4 * width)
        parts.write_rows(code, self._out, lambda row: self._scale, target, width)

    def sum_keys(self, begin: Value, end: Value, *, first: Value) -> None:
        """Add the chunk's part to dk^T and dv^T, which begin with the `first` query head."""
        code, size = self._code, rows_bytes(self._width)
        with code.loop(end, parts.first_key_block(code, begin, self._window)) as other:
            start = code.select(begin < other, other, begin)
            stop = code.smaller(end, parts.query_blocks_end(other, self._window))
            for number, (columns, pairs) in enumerate(
                ((self._q_columns, self._ds), (self._dy_columns, self._weights))
            ):
                with code.loop(self._width // DEPTH) as column:
                    sums = self._keys.sums(number, other, column)
                    parts.open_sums(code, sums, fresh=first & start.equals(other))
                    with code.loop(stop, start) as block:
                        left = columns + (block - begin) * size + column * (2 * TILE_BYTES)
                        right = pairs + ((block - begin) * self._blocks + other) * WEIGHTS_BYTES
                        parts.multiply_add(code, left, ROW_BYTES, right, TILE_BYTES)
                    tiles.move_sums(code, tiles.store, sums, SCORES_ROW)
