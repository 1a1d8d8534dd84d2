"""The stages of the transform in hadamard.py, on sixteen rows that lie across lanes.

A buffer holds a register for each column, of that column's number in each of the sixteen rows.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.rowwise import BYTES, KINDS
from qtune_kernels.cpu.simd import F32, LANES, Code, Value, vector

# of a column in a buffer
ROW_BYTES = 4 * LANES
# sums made at a time: enough to be under way at once, few enough for registers
MOST_SUMS = 20


class Stage(NamedTuple):
    """A factor: which columns it combines, and how."""

    order: int
    stride: int
    """Columns from one that is combined to the next."""
    fast: bool
    """A power of two by additions, not any matrix."""

    @property
    def num_numbers(self) -> int:
        """Of its matrix."""
        return 0 if self.fast else self.order * self.order

    def outputs(self) -> list[slice]:
        """Columns made at a time, about equally many."""
        parts = -(-self.order // MOST_SUMS)
        bounds = [self.order * part // parts for part in range(parts + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]


class Transform:
    """Sixteen rows on their way through the buffers."""

    def __init__(self, code: Code, width: int, dtype: str, signs: Value) -> None:
        self._code, self._width, self._signs = code, width, signs
        self._kind, self._size = KINDS[dtype], BYTES[dtype]

    def read(self, rows: Sequence[Value], buffer: Value, radix: int, transposed: bool) -> None:
        """Turn rows, given by their addresses, into columns, and transform `radix` neighbours."""
        with self._code.loop(self._width, 0, LANES) as first:
            pieces = [self._code.read(row + first * self._size, self._kind) for row in rows]
            columns = tiles.transpose(pieces)
            if not transposed:
                columns = self._signed(columns, first)
            for start in range(0, LANES, radix):
                columns[start : start + radix] = fast(columns[start : start + radix])
            for place, column in enumerate(columns):
                self._code.store(column, buffer + (first + place) * ROW_BYTES)

    def apply(self, stage: Stage, matrix: Value, source: Value, target: Value) -> None:
        """One factor, from a buffer into the other."""
        span = stage.order * stage.stride
        with (
            self._code.loop(self._width, 0, span) as outer,
            self._code.loop(stage.stride) as inner,
        ):
            at = (outer + inner) * ROW_BYTES
            make = self._fast if stage.fast else self._dense
            make(stage, matrix, source + at, target + at)

    def write(self, buffer: Value, rows: Sequence[Value], transposed: bool) -> None:
        """Turn columns into rows at the given addresses."""
        with self._code.loop(self._width, 0, LANES) as first:
            columns = [self._load(buffer + (first + place) * ROW_BYTES) for place in range(LANES)]
            if transposed:
                columns = self._signed(columns, first)
            for row, piece in zip(rows, tiles.transpose(columns), strict=True):
                self._code.write(piece, row + first * self._size, self._kind)

    def _fast(self, stage: Stage, matrix: Value, source: Value, target: Value) -> None:
        step = stage.stride * ROW_BYTES
        made = fast([self._load(source + step * place) for place in range(stage.order)])
        for place, column in enumerate(made):
            self._code.store(column, target + step * place)

    def _dense(self, stage: Stage, matrix: Value, source: Value, target: Value) -> None:
        step = stage.stride * ROW_BYTES
        for part in stage.outputs():
            width = part.stop - part.start
            none = self._code.value(0, vector(F32))
            sums = [self._code.variable(none) for _ in range(width)]
            with self._code.loop(stage.order) as place:
                column = self._load(source + place * step)
                for number, total in enumerate(sums):
                    factor = self._code.load(matrix + (place * width + number) * 4, F32)
                    total.set(self._code.fma(column, factor, total.get()))
            for number, total in enumerate(sums, part.start):
                self._code.store(total.get(), target + step * number)
            matrix = matrix + stage.order * width * 4

    def _signed(self, columns: list[Value], first: Value) -> list[Value]:
        at = self._signs + first * 4
        return [column * self._code.load(at + 4 * i, F32) for i, column in enumerate(columns)]

    def _load(self, address: Value) -> Value:
        return self._code.load(address, vector(F32))


def fast(columns: list[Value]) -> list[Value]:
    """Sylvester's transform of a power of two of values, by sums and differences."""
    step = 1
    while step < len(columns):
        for start in range(0, len(columns), 2 * step):
            for low in range(start, start + step):
                a, b = columns[low], columns[low + step]
                columns[low], columns[low + step] = a + b, a - b
        step *= 2
    return columns
