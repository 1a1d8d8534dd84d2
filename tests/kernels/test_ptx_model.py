"""The model against instructions worked out by hand from the PTX manual."""

import numpy as np
import ptx_model
import pytest


def word(value: int) -> np.ndarray:
    return np.array([value], dtype=np.uint32)


def run(text: str, *inputs: int) -> int:
    return int(ptx_model.run(text, [word(value) for value in inputs], 1)[0][0])


def test_bytes_are_picked_by_digits() -> None:
    assert run("prmt.b32 $0, $1, $2, 0x7210;", 0x33221100, 0x77665544) == 0x77221100
    assert run("prmt.b32 $0, $1, $2, 0x0123;", 0x33221100, 0x77665544) == 0x00112233


def test_high_digits_spread_the_sign() -> None:
    assert run("prmt.b32 $0, $1, $2, 0x89ab;", 0x80017F00, 0) == 0x000000FF


@pytest.mark.parametrize(
    ("table", "expected"), [(0xEA, 0b1110_1010), (0x80, 0b1000_0000), (0x96, 0b1001_0110)]
)
def test_three_inputs_name_a_bit_of_the_table(table: int, expected: int) -> None:
    # all eight combinations at once; combination i gives bit i of the table
    found = run(f"lop3.b32 $0, $1, $2, $3, {table};", 0b11110000, 0b11001100, 0b10101010)
    assert found & 0xFF == expected


def test_registers_and_blocks() -> None:
    text = "{\n.reg .b32 a, b;\nand.b32 a, $1, 0xf0;\nshr.u32 b, a, 4;\nand.b32 $0, b, 7;\n}"
    assert run(text, 0xFB) == 7


def test_what_is_not_modelled_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"mul\.lo\.u32"):
        run("mul.lo.u32 $0, $1, 3;", 1)
