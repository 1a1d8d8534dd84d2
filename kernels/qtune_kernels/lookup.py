"""PTX text that turns 2, 3 or 4-bit codes into 16-bit levels without touching memory.

`prmt` picks four bytes out of eight by a selector of four 4-bit digits. Packed 4-bit codes are
such digits already; 2-bit codes are after a mask, and 3-bit codes once their high bit is put in
between. Up to eight levels, one `prmt` gives the low bytes of four codes' levels and one the high
bytes. Of 16 levels, one takes the choice among levels 0 to 7, one that among 8 to 15 (their digits
are the codes' low three bits), and a third chooses between the two by the codes' high bit. Others
join low and high bytes. Any levels will do; each is rounded once to the 16-bit type, nothing else.

| bits | `prmt` | other instructions | codes |
| ---- | ------ | ------------------ | ----- |
| 4    | 16     | 5                  | 8     |
| 3    | 16     | 14                 | 16    |
| 2    | 16     | 5                  | 16    |

Levels that are whole multiples of a step need no table: a code that is put into the mantissa of a
number with the right exponent is that number plus so many 16ths, from which another is subtracted.
Eight codes of 4 bits cost 4 `prmt` and 7 others so; nothing is rounded, and the step goes into the
scale. With fewer bits that is no cheaper than the table, unless there are zero points: these are
subtracted anyway, and the number along with them (`Decoder.base`).

| bits | `prmt` | other instructions | codes |
| ---- | ------ | ------------------ | ----- |
| 4    | 4      | 3                  | 8     |
| 3    | 8      | 15                 | 16    |
| 2    | 8      | 7                  | 16    |
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qtune_kernels.packing import STRIP_SEGMENTS, code_bits

# segments whose codes are the even and the odd digits of a word, for each word of digits
WORDS = {4: ((0, 1),), 3: ((0, 2), (1, 3)), 2: ((0, 2), (1, 3))}
# the number whose last bit in 16 bits is a 16th, and its high byte; the low one is 0
STARTS = {torch.bfloat16: (8.0, 0x41), torch.float16: (64.0, 0x54)}
REGISTERS = """.reg .b32 digits0, digits1, choice0, choice1, small, large, low0, low1, high0, high1;
.reg .b32 plane, even, odd;"""


class Decoder(NamedTuple):
    """How a strip's bytes become numbers, and what levels they stand for: (n - base) * unit.

    The PTX text is empty for 8-bit codes, which need none.
    """

    ptx: str
    unit: float
    base: float = 0.0
    """Not 0 only with zero points, which are subtracted in the same step."""


def decoder(levels: Sequence[float], dtype: torch.dtype, zeros: bool = False) -> Decoder:
    """The cheapest text for these levels, with zero points or not; `dtype` bfloat16 or float16."""
    if not levels:
        # kernels make 128ths of 8-bit codes
        return Decoder("", 128.0)
    step, zero_code = even_step(levels)
    if step and zeros:
        base = STARTS[dtype][0] + zero_code / 16
        return Decoder(counted_ptx(code_bits(levels), dtype), 16 * step, base)
    if step and len(levels) == 16:
        return Decoder(even_ptx(zero_code, dtype), 16 * step)
    return Decoder(lookup_ptx(levels, dtype), 1.0)


def even_step(levels: Sequence[float]) -> tuple[float, int]:
    """The step of ascending levels of equal distance, and the code of their zero; else 0 and 0."""
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    if 0.0 not in levels or step <= 0:
        return 0.0, 0
    zero_code = levels.index(0.0)
    offs = [abs(level / step - (code - zero_code)) for code, level in enumerate(levels)]
    # levels may have been rounded to float32
    return (step, zero_code) if max(offs) < 1e-5 else (0.0, 0)


def even_ptx(zero_code: int, dtype: torch.dtype) -> str:
    """PTX that turns four bytes of 4-bit codes into 16ths, (code - `zero_code`) / 16.

    Registers as in `lookup_ptx`. Sixteenths rather than integers keep the scales, which are
    multiplied by the rest, clear of the subnormal numbers of float16.
    """
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    one, offset = (_both_halves(n, dtype) for n in (1.0, -STARTS[dtype][0] - zero_code / 16))
    lines = [
        ".reg .b32 code, one, offset;",
        *_counted(4, dtype),
        f"mov.b32 one, {one};",
        f"mov.b32 offset, {offset};",
    ]
    lines += [f"fma.rn.{kind} ${register}, ${register}, one, offset;" for register in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


def counted_ptx(bits: int, dtype: torch.dtype) -> str:
    """PTX that turns storage bytes into STARTS + code / 16; registers as in `lookup_ptx`."""
    lines = [".reg .b32 code, plane, high;", *_counted(bits, dtype)]
    return "{\n" + "\n".join(lines) + "\n}"


def _counted(bits: int, dtype: torch.dtype) -> list[str]:
    high_byte = STARTS[dtype][1]
    stored = 2 * STRIP_SEGMENTS[bits]
    lines = [f"shr.u32 plane, ${stored + 1}, ${stored + 2};"] if bits == 3 else []
    for segment in range(STRIP_SEGMENTS[bits]):
        lines += _codes_of(segment, bits, f"${stored}")
        for half, selector in enumerate((0x4140, 0x4342)):
            target = 2 * segment + half
            lines.append(f"prmt.b32 ${target}, code, 0x{high_byte:02x}, 0x{selector:04x};")
    return lines


def _codes_of(segment: int, bits: int, stored: str) -> list[str]:
    """The codes of one segment alone, in the bytes of `code`."""
    field = 8 // STRIP_SEGMENTS[bits]
    mask = ((1 << field) - 1) * 0x01010101
    lines = [f"shr.u32 code, {stored}, {field * segment};"] if segment else []
    lines.append(f"and.b32 code, {'code' if segment else stored}, 0x{mask:08x};")
    if bits == 3:
        # high bits to where they are worth 4
        moves = {0: "shl.b32 high, plane, 2;", 1: "shl.b32 high, plane, 1;"}
        moves |= {2: "mov.b32 high, plane;", 3: "shr.u32 high, plane, 1;"}
        lines += [moves[segment], "lop3.b32 code, high, 0x04040404, code, 0xea;"]
    return lines


def _both_halves(number: float, dtype: torch.dtype) -> str:
    """Twice that number, in 16 bits, as a hexadecimal word."""
    half = int(torch.tensor(number, dtype=dtype).view(torch.int16)) & 0xFFFF
    return f"0x{half << 16 | half:08x}"


def lookup_ptx(levels: Sequence[float], dtype: torch.dtype) -> str:
    """PTX that turns four storage bytes into 16-bit levels of the codes in them.

    Registers $0 and $1 are the levels of the tile's first segment, $2 and $3 of its second, and so
    on; each holds two levels, the earlier one in its low half. The input follows them. For 3 bits
    that is the bytes of the low bits, then those of the high bits, then how far these are to be
    shifted right. `dtype` is bfloat16 or float16.
    """
    bits = code_bits(levels)
    low_bytes, high_bytes = _byte_words(levels, dtype)
    stored = 2 * STRIP_SEGMENTS[bits]
    lines = [REGISTERS]
    if bits == 3:
        lines.append(f"shr.u32 plane, ${stored + 1}, ${stored + 2};")
    for even, odd in WORDS[bits]:
        lines += _digits(bits, f"${stored}", even, odd)
        for half in (0, 1):
            lines += _choose(f"low{half}", low_bytes, half)
            lines += _choose(f"high{half}", high_bytes, half)
            lines += [_join_bytes(2 * even + half, half, 0), _join_bytes(2 * odd + half, half, 1)]
    return "{\n" + "\n".join(lines) + "\n}"


def _digits(bits: int, stored: str, even: int, odd: int) -> list[str]:
    """Digits of 0 to 7 for two segments: of two bytes in `digits0`, of the others in `digits1`."""
    if bits == 4:
        lines = [
            f"and.b32 digits0, {stored}, 0x77777777;",
            f"shr.u32 choice0, {stored}, 1;",
            # digit i of the choice is i, plus 4 where code i is 8 or more
            "lop3.b32 choice0, choice0, 0x44444444, 0x32103210, 0xea;",
            "shr.u32 choice1, choice0, 16;",
        ]
    else:
        lines = [f"shr.u32 digits0, {stored}, {2 * even};"] if even else []
        lines += [f"and.b32 digits0, {'digits0' if even else stored}, 0x33333333;"]
    if bits == 3:
        lines += [
            f"shl.b32 even, plane, {2 - even};",
            f"shl.b32 odd, plane, {6 - odd};",
            # the bits of `even` where the mask has ones, of `odd` elsewhere
            "lop3.b32 even, even, odd, 0x0f0f0f0f, 0xe4;",
            "lop3.b32 digits0, even, 0x44444444, digits0, 0xea;",
        ]
    return [*lines, "shr.u32 digits1, digits0, 16;"]


def _choose(target: str, words: list[str], half: int) -> list[str]:
    """One byte of the levels of four codes."""
    if len(words) < 4:
        return [f"prmt.b32 {target}, {words[0]}, {words[-1]}, digits{half};"]
    return [
        f"prmt.b32 small, {words[0]}, {words[1]}, digits{half};",
        f"prmt.b32 large, {words[2]}, {words[3]}, digits{half};",
        f"prmt.b32 {target}, small, large, choice{half};",
    ]


def _byte_words(levels: Sequence[float], dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """The low, and the high, bytes of the levels as hexadecimal words of four."""
    halves = torch.tensor(levels, dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    planes = (bytes(half >> shift & 0xFF for half in halves) for shift in (0, 8))
    low, high = (
        [f"0x{int.from_bytes(plane[at : at + 4], 'little'):08x}" for at in range(0, len(levels), 4)]
        for plane in planes
    )
    return low, high


def _join_bytes(register: int, half: int, digit: int) -> str:
    """The instruction that joins the bytes of the codes `digit` and `digit` + 2 of a half word."""
    digits = (digit, digit + 4, digit + 2, digit + 6)
    selector = sum(place << 4 * i for i, place in enumerate(digits))
    return f"prmt.b32 ${register}, low{half}, high{half}, 0x{selector:04x};"
