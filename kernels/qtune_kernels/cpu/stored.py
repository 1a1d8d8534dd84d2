"""Matrices as they lie in memory: a kernel reads 32 neighbours of a row, in bf16."""

from typing import Protocol

from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.math import to_bf16
from qtune_kernels.cpu.simd import BF16, F32, LANES, Code, Value, vector
from qtune_kernels.cpu.tiles import DEPTH

HALVES = vector(BF16, DEPTH)


class Stored(Protocol):
    """A matrix that can be read in pieces of a row."""

    def read(self, row: Value, column: Value) -> Value:
        """Elements `column` to `column` + 31 of a row, bf16."""
        ...


class Dense:
    """Of bf16, with rows `stride` bytes apart."""

    def __init__(self, code: Code, start: Value, stride: Value) -> None:
        self._code, self._start, self._stride = code, start, stride

    def read(self, row: Value, column: Value) -> Value:
        """Elements `column` to `column` + 31 of a row, bf16."""
        return self._code.load(self._start + row * self._stride + column * 2, HALVES)


class Coded:
    """Of codes, `width` to a row."""

    def __init__(self, packed: Packed, width: Value) -> None:
        self._packed, self._width = packed, width

    def read(self, row: Value, column: Value) -> Value:
        """Elements `column` to `column` + 31 of a row, bf16."""
        return self._packed.halves(row * self._width + column).bits(HALVES)


class Bounded:
    """Of float32, times a factor; outside of its [rows, columns] lie zeros."""

    def __init__(
        self, code: Code, start: Value, rows: Value, columns: Value, factor: Value
    ) -> None:
        self._code, self._start = code, start
        self._rows, self._columns, self._factor = rows, columns, code.spread(factor)

    def read(self, row: Value, column: Value) -> Value:
        """Elements `column` to `column` + 31 of a row, bf16."""
        code, halves = self._code, []
        inside = code.spread(row < self._rows)
        for half in range(2):
            first = column + LANES * half
            live = inside & code.first_lanes(self._columns - code.smaller(first, self._columns))
            address = self._start + (row * self._columns + first) * 4
            halves.append(code.read(address, F32, live) * self._factor)
        return to_bf16(code, *halves)
