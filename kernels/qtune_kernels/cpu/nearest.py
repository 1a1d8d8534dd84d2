"""Which of up to sixteen levels is nearest: a binary search in registers, without branches.

The boundaries between neighbouring levels fill one register. A step of the search looks up the
boundary in the middle of what is left for each of 16 ratios and compares. A ratio on a boundary
belongs to the lower level, as in `qtune_kernels.nearest`. Codes of 8 bits need no search. Ratios
are rounded as in `quantize.py`.
"""

from functools import cache

import torch
from torch import Tensor

from qtune_kernels.cpu.simd import F32, I32, LANES, Code, Value, vector
from qtune_kernels.nearest import SMALLEST_SCALE, boundaries
from qtune_kernels.packing import code_bits

# magnitude of the levels of 8-bit codes
MOST = 127.0
# bytes of a table
TABLE_BYTES = 4 * LANES


class Nearest:
    """The levels of a format as a kernel searches them; `tables` is the address of those below."""

    def __init__(self, code: Code, tables: Value, bits: int) -> None:
        self._code = code
        loaded = [code.load(tables + TABLE_BYTES * row, vector(F32)) for row in range(bits + 2)]
        *self._bounds, self._levels, codes = loaded
        self._codes = codes.bits(vector(I32))

    def rank(self, ratio: Value) -> Value:
        """Which level in ascending order is nearest to each of 16 ratios, int32."""
        rank = self._code.value(0, vector(I32))
        for place, bounds in enumerate(self._bounds):
            step = 1 << len(self._bounds) - 1 - place
            above = ratio > self._look_up(bounds, rank)
            rank = self._code.select(above, rank + step, rank)
        return rank

    def level(self, rank: Value) -> Value:
        """The levels of these ranks, float32."""
        return self._look_up(self._levels, rank)

    def code(self, rank: Value) -> Value:
        """The codes of these ranks, int32."""
        look_up = "llvm.x86.avx512.permvar.si.512"
        return self._code.call(look_up, vector(I32), self._codes, rank)

    def _look_up(self, table: Value, rank: Value) -> Value:
        return self._code.call("llvm.x86.avx512.permvar.sf.512", vector(F32), table, rank)


def nearest_whole(code: Code, ratio: Value) -> Value:
    """The nearest level of an 8-bit code, -127 to 127, to each of 16 ratios, float32."""
    whole = code.call("llvm.rint", ratio.type, ratio)
    least, most = (code.value(end, ratio.type) for end in (-MOST, MOST))
    whole = code.select(whole < least, least, whole)
    return code.select(whole > most, most, whole)


def divisor(code: Code, scale: Value, bits: int) -> Value:
    """What weights are divided by, or for less than 8 bits multiplied with, to get ratios."""
    if bits == 8:
        return code.select(scale.equals(0.0), code.value(1.0, scale.type), scale)
    usable = code.call("llvm.fabs", scale.type, scale) > SMALLEST_SCALE
    return 1.0 / code.select(usable, scale, SMALLEST_SCALE)


@cache
def tables(levels: tuple[float, ...]) -> Tensor:
    """What `Nearest` reads, float32 [bits + 2, 16]: boundaries for each step, levels, codes.

    A step from rank r on compares with the boundary `step` - 1 further, which therefore stands in
    place r of its table. Codes are int32.
    """
    with torch.inference_mode(False):
        bounds, codes = boundaries(levels)
        # of two levels that are the largest, none is above the first
        bounds = bounds.where(bounds < max(levels), torch.inf)
        made = torch.full((code_bits(levels) + 2, LANES), torch.inf, device="cpu")
        for place in range(code_bits(levels)):
            later = bounds[len(levels) // 2 ** (place + 1) - 1 :]
            made[place, : len(later)] = later
        made[-2, : len(levels)] = torch.tensor(levels, device="cpu")[codes]
        made[-1].view(torch.int32)[: len(levels)] = codes.int()
        return made
