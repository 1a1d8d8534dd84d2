"""Weights -> codes and their packing in one pass, sixteen at a time.

The bytes of a run (`packing.py`) hold codes of several segments: they are made one segment after
the other and joined in registers. Roundings are those of `quantize.encode`.
"""

import torch
from torch import Tensor

from qtune_kernels.cpu.groups import Groups, Layout, Places
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.nearest import Nearest, divisor, nearest_whole, tables
from qtune_kernels.cpu.simd import BF16, F16, F32, I8, I32, LANES, Code, Value
from qtune_kernels.packing import RUN_SEGMENTS, SEGMENT, code_bits, packed_bytes

KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
PARTS = SEGMENT // LANES
# the 8-bit code of 0
MIDDLE = 128.0


def encodes(weight: Tensor, group_size: int) -> bool:
    """Whether `encode` takes this weight on this machine."""
    return weight.is_cpu and weight.dtype in KINDS and group_size >= LANES and available()


def encode(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: tuple[float, ...],
    group_size: int,
) -> Tensor:
    """Storage bytes (`packing.pack`) of a weight; scales and zeros are float32 [groups]."""
    flat, bits = weight.reshape(-1).contiguous(), code_bits(levels)
    packed = torch.empty(packed_bytes(flat.numel(), bits), dtype=torch.uint8, device="cpu")
    scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
    _encode(
        packed.data_ptr(),
        flat.data_ptr(),
        flat.numel(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        scales.numel(),
        tables(levels).data_ptr() if levels else 0,
        layout=Layout(bits, group_size, torch.float32, None if zeros is None else torch.float32),
        dtype=flat.dtype,
    )
    return packed


@kernel
def _encode(
    code: KernelCode,
    packed: Pointer,
    weights: Pointer,
    count: Integer,
    scales: Pointer,
    zeros: Pointer,
    num_groups: Integer,
    tables: Pointer,
    *,
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    nothing = scales
    places = Places(nothing, scales, nothing, nothing, zeros, nothing, nothing, num_groups)
    encoder = Encoder(code, weights, count, places, tables, layout, dtype)
    segments = RUN_SEGMENTS[layout.bits]
    run_weights, run_bytes = segments * SEGMENT, segments * SEGMENT * layout.bits // 8
    with code.share((count + (run_weights - 1)) // run_weights) as run:
        at, target = run * run_weights, packed + run * run_bytes
        made = [encoder.segment(at + SEGMENT * number) for number in range(segments)]
        for part in range(PARTS):
            for plane, joined in enumerate(planes([codes[part] for codes in made], layout.bits)):
                place = SEGMENT * plane + LANES * part
                live = encoder.live(at + place) if layout.bits == 8 else None
                code.store(joined.to(I8), target + place, live)


class Encoder:
    """A flat weight and what turns it into codes."""

    def __init__(
        self,
        code: Code,
        weights: Value,
        count: Value,
        places: Places,
        tables: Value,
        layout: Layout,
        dtype: torch.dtype,
    ) -> None:
        self._code, self._weights, self._count, self._dtype = code, weights, count, dtype
        self._groups, self._group_size = Groups(code, places, layout), layout.group_size
        self._bits = layout.bits
        self._nearest = Nearest(code, tables, layout.bits) if layout.bits < 8 else None

    def live(self, at: Value) -> Value:
        """Which of 16 weights there are."""
        return self._code.first_lanes(self._count - self._code.smaller(at, self._count))

    def segment(self, at: Value) -> list[Value]:
        """The codes, int32, of 64 neighbours; 0 where there are no more weights."""
        made, shared = [], self._group_size % SEGMENT == 0
        for part in range(PARTS):
            first = at + LANES * part
            if part == 0 or not shared:
                scales, zeros = self._groups.lanes(first)
                divisors = divisor(self._code, scales, self._bits)
            live = self.live(first)
            address = self._weights + first * self._dtype.itemsize
            weights = self._code.read(address, KINDS[self._dtype], live)
            made.append(self._code.select(live, self._codes(weights, divisors, zeros), 0))
        return made

    def _codes(self, weights: Value, divisors: Value, zeros: Value | None) -> Value:
        ratios = weights / divisors if self._nearest is None else weights * divisors
        ratios = ratios if zeros is None else ratios + zeros
        if self._nearest is None:
            return (nearest_whole(self._code, ratios) + MIDDLE).to(I32)
        return self._nearest.code(self._nearest.rank(ratios))


def planes(codes: list[Value], bits: int) -> list[Value]:
    """The bytes that codes of all segments of a run share, one value for each 64 bytes."""
    if bits != 3:
        return [_joined(codes, bits)]
    low = [code & 3 for code in codes]
    high = [code >> 2 for code in codes]
    return [_joined(low[:4], 2), _joined(low[4:], 2), _joined(high, 1)]


def _joined(codes: list[Value], bits: int) -> Value:
    made = codes[0]
    for place, code in enumerate(codes[1:], 1):
        made = made | code << place * bits
    return made
