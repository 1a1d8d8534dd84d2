"""What all weights of a group share, in registers: its scale and, where there is one, its zero.

They are stored in as many ways as `scales.py` knows, told apart when a kernel is compiled. Products
and sums are rounded separately, as there. A group past the last one, which only the filling at the
end of storage belongs to, is read as the last.
"""

from typing import NamedTuple

import torch

from qtune_kernels.cpu.simd import F16, F32, I8, I32, I64, LANES, Code, Value
from qtune_kernels.scales import SCALE_GROUP, ZERO_BITS

FLOATS = {torch.float16: F16, torch.float32: F32}


class Layout(NamedTuple):
    """How a quantized matrix is stored: what a kernel is compiled for."""

    bits: int
    group_size: int
    scales: torch.dtype
    """Of the scales' codes: uint8 (dynamic map), int8 (linear), or float16, float32 themselves."""
    zeros: torch.dtype | None


class Places(NamedTuple):
    """Where a quantized matrix lies: addresses, and the number of its groups."""

    packed: Value
    scale_codes: Value
    scale_scales: Value
    scale_offset: Value
    zeros: Value
    scale_map: Value
    levels: Value
    num_groups: Value


class Groups:
    """Scales and zeros of a quantized matrix; groups have at least 16 weights."""

    def __init__(self, code: Code, places: Places, layout: Layout) -> None:
        self._code, self._places, self._layout = code, places, layout
        self._last = places.num_groups - 1
        coded = layout.scales not in FLOATS
        self._offset = code.load(places.scale_offset, F32) if coded else None

    def number(self, at: Value) -> Value:
        """The group of a weight of the flat matrix."""
        return self._code.smaller(at // self._layout.group_size, self._last)

    def lanes(self, at: Value) -> tuple[Value, Value | None]:
        """Scales and zeros of the 16 weights from `at` on, float32."""
        group, size = self.number(at), self._layout.group_size
        first = self._spread(group)
        if size % LANES == 0:
            return first
        own = self._code.first_lanes((at // size + 1) * size - at)
        scales, zeros = self._spread(self._code.smaller(group + 1, self._last))
        mixed = self._code.select(own, first[0], scales)
        if first[1] is None or zeros is None:
            return mixed, None
        return mixed, self._code.select(own, first[1], zeros)

    def scale(self, group: Value) -> Value:
        """A group's scale, one float32."""
        code, places, kind = self._code, self._places, self._layout.scales
        if self._offset is None:
            return self._float(places.scale_codes, group, kind)
        entry = code.load(places.scale_codes + group, I8)
        if kind == torch.int8:
            level = entry.signed_to(F32)
        else:
            level = code.load(places.scale_map + entry.to(I64) * 4, F32)
        coarse = code.load(places.scale_scales + group // SCALE_GROUP * 4, F32)
        return level * coarse + self._offset

    def zero(self, group: Value) -> Value | None:
        """A group's zero, one float32, or None where the matrix has none."""
        places, kind = self._places, self._layout.zeros
        if kind is None:
            return None
        if kind in FLOATS:
            return self._float(places.zeros, group, kind)
        field = ZERO_BITS[self._layout.bits]
        per_byte = 8 // field
        byte = self._code.load(places.zeros + group // per_byte, I8).to(I32)
        shift = (group % per_byte * field).to(I32)
        return (byte >> shift & (1 << field) - 1).to(F32)

    def _spread(self, group: Value) -> tuple[Value, Value | None]:
        """Scale and zero of a group in all lanes."""
        zero = self.zero(group)
        spread = self._code.spread
        return spread(self.scale(group)), None if zero is None else spread(zero)

    def _float(self, start: Value, group: Value, kind: torch.dtype) -> Value:
        return self._code.load(start + group * kind.itemsize, FLOATS[kind]).to(F32)
