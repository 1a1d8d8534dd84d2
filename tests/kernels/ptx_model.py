"""A model, in NumPy, of the few PTX instructions that the look-ups use, by the PTX manual's
definitions."""

import operator
from collections.abc import Callable

import numpy as np

Words = np.ndarray


def run(text: str, inputs: list[Words], num_outputs: int) -> list[Words]:
    """The output registers $0, $1, ..., each uint32 [n], after running `text` on n lanes at once.

    Inputs follow the outputs in number. An instruction that is not modelled raises KeyError.
    """
    registers = {f"${num_outputs + i}": word.astype(np.uint32) for i, word in enumerate(inputs)}
    shape = np.broadcast_shapes(*(word.shape for word in inputs))
    for line in text.replace("{", "").replace("}", "").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.strip().split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        words = [
            registers[source] if source in registers else np.uint32(int(source, 0))
            for source in sources
        ]
        registers[target] = np.asarray(INSTRUCTIONS[name](*words), dtype=np.uint32)
    return [np.broadcast_to(registers[f"${i}"], shape) for i in range(num_outputs)]


def permute_bytes(low: Words, high: Words, selector: Words) -> Words:
    """`prmt`: byte i of the result is the byte of high:low that the selector's digit i names.

    A digit of 8 or more gives the sign of that byte eight times.
    """
    both = np.asarray(low, np.uint64) | np.asarray(high, np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(both.shape, np.shape(selector)), np.uint64)
    for i in range(4):
        digit = np.asarray(selector, np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(digit & np.uint64(8), signs, byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def any_of_three(first: Words, second: Words, third: Words, table: Words) -> Words:
    """`lop3`: bit by bit, the entry of `table` that three bits name, the first as the highest."""
    result = np.zeros(np.broadcast_shapes(*map(np.shape, (first, second, third))), np.uint32)
    one = np.uint32(1)
    for bit in range(32):
        high, middle, low = (word >> np.uint32(bit) & one for word in (first, second, third))
        entry = high << np.uint32(2) | middle << one | low
        result |= (table >> entry & one) << np.uint32(bit)
    return result


def multiply_add_bf16(first: Words, second: Words, third: Words) -> Words:
    """`fma.rn.bf16x2`: halves as bfloat16; products and sums that need no rounding only."""

    def halves(words: Words) -> list[np.ndarray]:
        words = np.asarray(words, np.uint32)
        low, high = words << np.uint32(16), words & np.uint32(0xFFFF0000)
        return [low.view(np.float32), high.view(np.float32)]

    parts = [halves(words) for words in (first, second, third)]
    low, high = (a * b + c for a, b, c in zip(*parts, strict=True))
    exact = [np.asarray(part, np.float32).view(np.uint32) for part in (low, high)]
    assert not any(np.any(part & np.uint32(0xFFFF)) for part in exact)
    return exact[1] | exact[0] >> np.uint32(16)


def multiply_add_fp16(first: Words, second: Words, third: Words) -> Words:
    """`fma.rn.f16x2`: halves as float16; products that need no rounding only."""
    first, second, third = (
        np.ascontiguousarray(np.broadcast_to(words, np.shape(first)), np.uint32).view(np.float16)
        for words in (first, second, third)
    )
    return (first * second + third).view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "and.b32": operator.and_,
    "fma.rn.bf16x2": multiply_add_bf16,
    "fma.rn.f16x2": multiply_add_fp16,
    "mov.b32": lambda word: word,
    "shl.b32": operator.lshift,
    "shr.u32": operator.rshift,
    "lop3.b32": any_of_three,
    "prmt.b32": permute_bytes,
}
