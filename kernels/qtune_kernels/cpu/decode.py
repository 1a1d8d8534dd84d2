"""Codes -> weights in registers: a segment of 64 neighbours as four vectors of float32.

The 16 levels of a format of up to 4 bits fill one register, and a single instruction looks 16 codes
up in it by their lowest four bits. Narrower formats repeat their levels to 16, so bits above their
own do not matter. The bits of storage are those of `packing.py`, the arithmetic is that of
`dequantize`: product and sum of a scale rounded separately, one float32 product for a weight.
"""

from qtune_kernels.cpu.simd import F32, I8, I32, I64, LANES, Code, Value, vector
from qtune_kernels.packing import SEGMENT
from qtune_kernels.scales import SCALE_GROUP


class Packed:
    """A quantized matrix as a kernel reads it; all addresses."""

    def __init__(
        self,
        code: Code,
        packed: Value,
        scale_codes: Value,
        scale_scales: Value,
        scale_offset: Value,
        scale_map: Value,
        levels: Value,
        *,
        bits: int,
        group_size: int,
    ) -> None:
        self._code, self._bits, self._group_size = code, bits, group_size
        self._packed, self._scale_codes, self._scale_scales = packed, scale_codes, scale_scales
        self._scale_map = scale_map
        self._offset = code.load(scale_offset, F32)
        self._levels = code.load(levels, vector(F32)) if bits < 8 else None

    def weights(self, at: Value, count: int) -> list[Value]:
        """`count` float32 vectors from weight `at` of the flat matrix on, all in one segment."""
        codes = self._codes(at // SEGMENT, at % SEGMENT, count)
        scales = self._scales(at, count)
        if self._levels is None:
            steps = [scale / 127.0 for scale in scales]
            numbers = [code.signed_to(F32) - 128.0 for code in codes]
        else:
            steps, numbers = scales, [self._look_up(self._levels, code) for code in codes]
        return [number * step for number, step in zip(numbers, steps, strict=True)]

    def _look_up(self, levels: Value, code: Value) -> Value:
        return self._code.call("llvm.x86.avx512.permvar.sf.512", vector(F32), levels, code)

    def _codes(self, segment: Value, offset: Value, count: int) -> list[Value]:
        """Codes as int32; bits above those of a code are anything, except with 8 bits."""
        if self._bits == 8:
            return self._bytes(segment * SEGMENT + offset, count)
        if self._bits == 3:
            return self._three_bits(segment, offset, count)
        per_run = 8 // self._bits
        run, place = segment // per_run, segment % per_run
        shift = self._code.spread((place * self._bits).to(I32))
        return [byte >> shift for byte in self._bytes(run * SEGMENT + offset, count)]

    def _three_bits(self, segment: Value, offset: Value, count: int) -> list[Value]:
        run, place = segment // 8 * (3 * SEGMENT) + offset, segment % 8
        low_shift = self._code.spread((place % 4 * 2).to(I32))
        high_shift = self._code.spread(place.to(I32))
        lows = self._bytes(run + place // 4 * SEGMENT, count)
        highs = self._bytes(run + 2 * SEGMENT, count)
        return [
            low >> low_shift & 3 | high >> high_shift << 2
            for low, high in zip(lows, highs, strict=True)
        ]

    def _bytes(self, at: Value, count: int) -> list[Value]:
        kind = vector(I8)
        return [
            self._code.load(self._packed + at + LANES * part, kind).to(I32) for part in range(count)
        ]

    def _scales(self, at: Value, count: int) -> list[Value]:
        """The scale of each vector's group, in all lanes."""
        if self._group_size >= LANES * count:
            return [self._code.spread(self._scale(at // self._group_size))] * count
        places = [(at + LANES * part) // self._group_size for part in range(count)]
        return [self._code.spread(self._scale(place)) for place in places]

    def _scale(self, group: Value) -> Value:
        entry = self._code.load(self._scale_codes + group, I8).to(I64)
        level = self._code.load(self._scale_map + entry * 4, F32)
        coarse = self._code.load(self._scale_scales + group // SCALE_GROUP * 4, F32)
        return level * coarse + self._offset
