"""Keys and values of a sample in the backward pass of attention, and sums of their gradients."""

from qtune_kernels.cpu import attention_tiles as parts
from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.attention_tiles import SCORES_ROW, Arena, Rows, rows_bytes
from qtune_kernels.cpu.simd import F32, Code, Value
from qtune_kernels.cpu.tiles import DEPTH, ROW_BYTES, SIDE, TILE_BYTES


class Keys:
    """A sample's keys and values ready for products; dk^T and dv^T, for each block [D, 32]."""

    def __init__(self, code: Code, arena: Arena, blocks: Value, width: int) -> None:
        self._code, self.width, self._size = code, width, rows_bytes(width)
        size = blocks * self._size
        self._scoring, self._paired, self._valuing = (arena.take(size) for _ in range(3))
        self._sums = [arena.take(2 * size) for _ in range(2)]
        self._rows, self._out = arena.take(self._size), arena.take(2 * self._size)

    def take(self, block: Value, key: Rows, value: Rows) -> None:
        """Arrange a block of keys and of values."""
        code, at = self._code, block * self._size
        parts.stage(code, key, self._rows, self.width)
        parts.transposed(code, self._rows, self._scoring + at, self.width)
        parts.paired(code, self._rows, self._paired + at, self.width)
        parts.stage(code, value, self._rows, self.width)
        parts.transposed(code, self._rows, self._valuing + at, self.width)

    def scoring(self, block: Value) -> Value:
        """The keys of a block as right factor of q k^T."""
        return self._scoring + block * self._size

    def valuing(self, block: Value) -> Value:
        """The values of a block as right factor of dy v^T."""
        return self._valuing + block * self._size

    def paired(self, block: Value, column: Value) -> Value:
        """32 columns of the keys of a block as right factor of dS k."""
        return self._paired + block * self._size + column * (2 * TILE_BYTES)

    def sums(self, number: int, block: Value, column: Value) -> Value:
        """32 rows of dk^T (0) or dv^T (1) of a block, [32, 32] float32."""
        return self._sums[number] + block * (2 * self._size) + column * (DEPTH * SCORES_ROW)

    def write(self, number: int, block: Value, factor: Value, target: Rows, *, wide: bool) -> None:
        """Write a block's rows of dk (0) or dv (1), times a factor."""
        code = self._code
        with code.loop(self.width // SIDE) as column:
            for half in range(2):
                start = self._sums[number] + block * (2 * self._size) + column * (SIDE * SCORES_ROW)
                start = start + ROW_BYTES * half
                rows = [code.read(start + SCORES_ROW * i, F32) for i in range(SIDE)]
                for i, row in enumerate(tiles.transpose(rows)):
                    place = (SIDE * half + i) * 4 * self.width
                    code.store(row, self._out + place + column * ROW_BYTES)
        parts.write_rows(code, self._out, lambda row: factor, target, self.width, wide=wide)
