"""PTX text that looks up 4-bit codes in a table of 16 levels without touching memory.

`prmt` picks four bytes out of eight by a selector of four 4-bit digits, and packed codes are such
digits already. For each byte of a 16-bit level, one `prmt` takes the choice among levels 0 to 7,
one that among 8 to 15 (their digits are the codes' low three bits), and a third chooses between
the two by the codes' high bit. So eight codes cost 16 `prmt` and four other instructions, for any
levels; each level is rounded once to the 16-bit type, nothing else.
"""

from collections.abc import Sequence

import torch

# a word is 4 storage bytes; code j of the low plane is nibble 2j, of the high plane nibble 2j + 1
LOW_PLANE = ((0, 2), (4, 6))
HIGH_PLANE = ((1, 3), (5, 7))


def lookup_ptx(levels: Sequence[float], dtype: torch.dtype) -> str:
    """PTX that turns four storage bytes in $4 into 16-bit levels, of low nibbles in $0 and $1.

    Those of the high nibbles are in $2 and $3. Each register holds two levels, the earlier one in
    its low half. `dtype` is bfloat16 or float16.
    """
    low_bytes, high_bytes = _byte_words(levels, dtype)
    lines = [
        ".reg .b32 digits0, digits1, choice0, choice1, small, large, low0, low1, high0, high1;",
        "and.b32 digits0, $4, 0x77777777;",
        "shr.u32 choice0, $4, 1;",
        # digit i of the choice is i, plus 4 where code i is 8 or more
        "lop3.b32 choice0, choice0, 0x44444444, 0x32103210, 0xea;",
        "shr.u32 digits1, digits0, 16;",
        "shr.u32 choice1, choice0, 16;",
    ]
    for half in (0, 1):
        for name, words in (("low", low_bytes), ("high", high_bytes)):
            lines += [
                f"prmt.b32 small, {words[0]}, {words[1]}, digits{half};",
                f"prmt.b32 large, {words[2]}, {words[3]}, digits{half};",
                f"prmt.b32 {name}{half}, small, large, choice{half};",
            ]
    for register, codes in enumerate((*LOW_PLANE, *HIGH_PLANE)):
        lines.append(_join_bytes(register, *codes))
    return "{\n" + "\n".join(lines) + "\n}"


def _byte_words(levels: Sequence[float], dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """The low, and the high, bytes of the 16 levels as four hexadecimal words each."""
    halves = torch.tensor(levels, dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    planes = (bytes(half >> shift & 0xFF for half in halves) for shift in (0, 8))
    low, high = (
        [f"0x{int.from_bytes(plane[at : at + 4], 'little'):08x}" for at in range(0, 16, 4)]
        for plane in planes
    )
    return low, high


def _join_bytes(register: int, first: int, second: int) -> str:
    """The instruction that joins the bytes of two codes of one half word in an output register."""
    half = first // 4
    digits = (first % 4, first % 4 + 4, second % 4, second % 4 + 4)
    selector = sum(digit << 4 * i for i, digit in enumerate(digits))
    return f"prmt.b32 ${register}, low{half}, high{half}, 0x{selector:04x};"
