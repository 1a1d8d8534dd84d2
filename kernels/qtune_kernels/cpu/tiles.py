"""AMX: the processor's eight matrix registers, of 16 rows of 64 bytes each.

`multiply` adds the product of a [16, 32] and a [32, 16] matrix of bf16 to [16, 16] sums in
float32. The right one lies in memory as pairs: row j holds elements (2j, n) and (2j + 1, n) side by
side, for n = 0..15. Linux hands these registers out only to processes that ask for them.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import cache

from llvmlite import ir

from qtune_kernels.cpu.processor import features
from qtune_kernels.cpu.simd import I8, I64, Code, Operand, Value

SIDE = 16
ROW_BYTES = 64
TILE_BYTES = SIDE * ROW_BYTES
# the depth of one multiplication, in bf16 elements
DEPTH = 32
NUM_TILES = 8
# registers for the sums of a block of 32 rows and 32 columns, and for its factors
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)
# of two vectors of 32: element i of one, then of the other, for the first 16 and for the last
LOW_PAIRS = [i // 2 + DEPTH * (i % 2) for i in range(DEPTH)]
HIGH_PAIRS = [lane + SIDE for lane in LOW_PAIRS]
# arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
SYSCALL, REQUEST, TILE_DATA = 158, 0x1023, 18


@cache
def available() -> bool:
    """Whether this processor has AMX for bf16 and the system lets this process use it."""
    needed = {"amx-tile", "amx-bf16", "avx512bf16", "avx512bw", "avx512vbmi"}
    if platform.system() != "Linux" or not needed <= features():
        return False
    return bool(ctypes.CDLL(None).syscall(SYSCALL, REQUEST, TILE_DATA) == 0)


def configure(code: Code) -> None:
    """Give this thread all registers in their full size."""
    table = code.stack(64)
    code.store(code.constants([1] + [0] * 63, I8), table)
    code.store(code.constants([ROW_BYTES] * NUM_TILES, ir.IntType(16)), table + 16)
    code.store(code.constants([SIDE] * NUM_TILES, I8), table + 48)
    code.call("llvm.x86.ldtilecfg", ir.VoidType(), table)


def release(code: Code) -> None:
    """Give the registers back, which makes switching threads cheap again."""
    code.call("llvm.x86.tilerelease", ir.VoidType())


def zero(code: Code, tile: int) -> None:
    """Clear a register."""
    code.call("llvm.x86.tilezero", ir.VoidType(), _number(code, tile))


def load(code: Code, tile: int, address: Value, stride: Value) -> None:
    """Fill a register with 16 rows that begin `stride` bytes apart."""
    code.call("llvm.x86.tileloadd64", ir.VoidType(), _number(code, tile), address, stride)


def load_passing(code: Code, tile: int, address: Value, stride: Value) -> None:
    """As `load`, for what passes through the first-level cache and should displace nothing."""
    code.call("llvm.x86.tileloaddt164", ir.VoidType(), _number(code, tile), address, stride)


def store(code: Code, tile: int, address: Value, stride: Value) -> None:
    """Write a register's rows `stride` bytes apart."""
    code.call("llvm.x86.tilestored64", ir.VoidType(), _number(code, tile), address, stride)


def multiply(code: Code, sums: int, left: int, right: int) -> None:
    """Add a product of two registers to a third."""
    numbers = (_number(code, tile) for tile in (sums, left, right))
    code.call("llvm.x86.tdpbf16ps", ir.VoidType(), *numbers)


def clear(code: Code) -> None:
    """Begin the sums of a block at zero."""
    for tile in SUMS:
        zero(code, tile)


def move_sums(
    code: Code, move: Callable[[Code, int, Value, Value], None], block: Value, stride: Operand
) -> None:
    """Load or store the sums of a block of float32 whose rows are `stride` bytes apart."""
    step = code.value(stride, I64)
    for tile in SUMS:
        corner = block + step * (SIDE * (tile // 2)) + ROW_BYTES * (tile % 2)
        move(code, tile, corner, step)


def multiply_block(code: Code) -> None:
    """Add the products of both left with both right factors to the sums."""
    for tile in SUMS:
        multiply(code, tile, LEFT[tile // 2], RIGHT[tile % 2])


def transpose(rows: list[Value]) -> list[Value]:
    """Sixteen vectors of 16 int32 with rows and columns exchanged."""
    for step in (1, 2, 4, 8):
        low = [lane if not lane & step else 16 + lane - step for lane in range(SIDE)]
        high = [lane + step if not lane & step else 16 + lane for lane in range(SIDE)]
        rows = [
            rows[i].shuffle(rows[i + step], low)
            if not i & step
            else rows[i - step].shuffle(rows[i], high)
            for i in range(SIDE)
        ]
    return rows


def _number(code: Code, tile: int) -> Value:
    return code.value(tile, I8)
