"""Codes -> weights in registers, in float32 or, twice as many at a time, in bf16.

The 16 levels of a format of up to 4 bits fill one register, and a single instruction looks 16 codes
up in it by their lowest four bits. Narrower formats repeat their levels to 16, so bits above their
own do not matter. The weights of a group are as few as its codes, so in bf16 the 16 weights are
made once, zero and scale included, and one instruction looks 32 of them up. Either way a weight is
(level - zero) * scale, difference and product rounded separately, as in `dequantize`.
"""

from llvmlite import ir

from qtune_kernels.cpu.groups import Groups, Layout, Places
from qtune_kernels.cpu.math import to_bf16
from qtune_kernels.cpu.simd import BF16, F32, I8, I16, I32, LANES, Code, Value, vector
from qtune_kernels.packing import SEGMENT

# weights that are read as bf16 at a time
HALVES = 2 * LANES
WORDS = vector(I16, HALVES)
MIDDLE = 128


class Packed:
    """A quantized matrix as a kernel reads it."""

    def __init__(self, code: Code, places: Places, layout: Layout) -> None:
        self._code, self._start, self._layout = code, places.packed, layout
        self._groups = Groups(code, places, layout)
        self._levels = code.load(places.levels, vector(F32)) if layout.bits < 8 else None

    def weights(self, at: Value, count: int) -> list[Value]:
        """`count` float32 vectors from weight `at` of the flat matrix on, all in one segment."""
        made, shared = [], self._layout.group_size % (LANES * count) == 0
        for part, levels in enumerate(self.levels(at, count)):
            if part == 0 or not shared:
                scales, zeros = self._groups.lanes(at + LANES * part)
            made.append((levels if zeros is None else levels - zeros) * scales)
        return made

    def levels(self, at: Value, count: int) -> list[Value]:
        """What the codes of these weights stand for, before zero and scale."""
        segment, offset = at // SEGMENT, at % SEGMENT
        places = [offset + LANES * part for part in range(count)]
        return [self._level(self._codes(segment, place, vector(I32))) for place in places]

    def halves(self, at: Value) -> Value:
        """The 32 weights from `at` on, all in one segment, in bf16 as int16."""
        if self._levels is None or self._layout.group_size % LANES:
            return to_bf16(self._code, *self.weights(at, 2)).bits(WORDS)
        codes = self._codes(at // SEGMENT, at % SEGMENT, WORDS)
        table = self._group_weights(at)
        if self._layout.group_size % HALVES == 0:
            both = table.shuffle(table, [*range(LANES)] * 2)
        else:
            both = table.shuffle(self._group_weights(at + LANES), range(HALVES))
            half = self._code.constants([0] * LANES + [LANES] * LANES, I16)
            codes = codes & LANES - 1 | half
        return self._code.call("llvm.x86.avx512.permvar.hi.512", WORDS, both, codes)

    def _group_weights(self, at: Value) -> Value:
        """What the 16 codes stand for in the group of a weight, in bf16 as int16."""
        assert self._levels is not None
        scales, zeros = self._groups.lanes(at)
        levels = self._levels if zeros is None else self._levels - zeros
        return (levels * scales).to(BF16).bits(vector(I16))

    def _level(self, code: Value) -> Value:
        if self._levels is None:
            return code.signed_to(F32) - float(MIDDLE)
        look_up = "llvm.x86.avx512.permvar.sf.512"
        return self._code.call(look_up, vector(F32), self._levels, code)

    def _codes(self, segment: Value, offset: Value, kind: ir.VectorType) -> Value:
        """Codes as integers; bits above those of a code are anything, except with 8 bits."""
        bits = self._layout.bits
        if bits == 8:
            return self._bytes(segment * SEGMENT + offset, kind)
        if bits == 3:
            return self._three_bits(segment, offset, kind)
        per_run = 8 // bits
        run, place = segment // per_run, segment % per_run
        return self._shifted(self._bytes(run * SEGMENT + offset, kind), place * bits)

    def _three_bits(self, segment: Value, offset: Value, kind: ir.VectorType) -> Value:
        run, place = segment // 8 * (3 * SEGMENT) + offset, segment % 8
        low = self._bytes(run + place // 4 * SEGMENT, kind)
        high = self._bytes(run + 2 * SEGMENT, kind)
        return self._shifted(low, place % 4 * 2) & 3 | self._shifted(high, place) << 2

    def _shifted(self, codes: Value, shift: Value) -> Value:
        return codes >> self._code.spread(shift.to(codes.type.element), codes.type.count)

    def _bytes(self, at: Value, kind: ir.VectorType) -> Value:
        stored = self._code.load(self._start + at, vector(I8, kind.count))
        return stored.to(kind.element)
