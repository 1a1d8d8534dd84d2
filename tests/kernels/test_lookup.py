from collections.abc import Sequence

import numpy as np
import ptx_model
import pytest
import torch
from samples import COUNTED, NF4, THREE_BITS, TWO_BITS

from qtune_kernels.lookup import STARTS, counted_ptx, decoder, even_ptx, even_step, lookup_ptx
from qtune_kernels.packing import code_bits

FP4 = (0, 0.005208333, 0.6666667, 1, 1 / 3, 0.5, 1 / 6, 0.25)
TABLES = {
    "nf4": NF4,
    "fp4": FP4 + tuple(-level for level in FP4),
    "integers": tuple(range(-8, 8)),
    "random": tuple(torch.randn(16, generator=torch.Generator().manual_seed(1)).tolist()),
}


def words(stored: np.ndarray) -> np.ndarray:
    """Registers of four bytes each."""
    return stored.view(np.uint32)[:, 0]


def table(levels: Sequence[float], dtype: torch.dtype) -> np.ndarray:
    return torch.tensor(levels, dtype=torch.float32).to(dtype).view(torch.int16).numpy()


def run(levels: Sequence[float], dtype: torch.dtype, *inputs: np.ndarray) -> np.ndarray:
    """The bits that the text gives, [lanes, segments, 4]."""
    num_segments = 2 if len(levels) == 16 else 4
    registers = ptx_model.run(lookup_ptx(levels, dtype), list(inputs), 2 * num_segments)
    return np.stack(registers, 1).view(np.int16).reshape(-1, num_segments, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_nibbles_become_levels(levels, dtype) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5000, 4), dtype=np.uint8)
    found = run(levels, dtype, words(stored))
    assert np.array_equal(found[:, 0], table(levels, dtype)[stored & 15])
    assert np.array_equal(found[:, 1], table(levels, dtype)[stored >> 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [TWO_BITS, (-1.5, -0.5, 0.5, 1.5)])
def test_two_bits_become_levels(levels, dtype) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5000, 4), dtype=np.uint8)
    found = run(levels, dtype, words(stored))
    for segment in range(4):
        expected = table(levels, dtype)[stored >> 2 * segment & 3]
        assert np.array_equal(found[:, segment], expected)


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [THREE_BITS, tuple(range(-4, 4))])
def test_two_bits_and_a_high_one_become_levels(levels, dtype, shift: int) -> None:
    low, high = np.random.default_rng(0).integers(0, 256, (2, 5000, 4), dtype=np.uint8)
    shifts = np.full(5000, shift, np.uint32)
    found = run(levels, dtype, words(low), words(high), shifts)
    for segment in range(4):
        code = low >> 2 * segment & 3 | (high >> shift + segment & 1) << 2
        assert np.array_equal(found[:, segment], table(levels, dtype)[code])


@pytest.mark.parametrize(
    ("levels", "others"), [(NF4, 5), (THREE_BITS, 14), (TWO_BITS, 5)], ids=["4", "3", "2"]
)
def test_a_word_costs_sixteen_permutations(levels, others: int) -> None:
    text = lookup_ptx(levels, torch.bfloat16)
    assert text.count("prmt.b32") == 16
    assert text.count(";") - text.count(".reg") == 16 + others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_code", [0, 7, 8, 15])
def test_even_codes_become_sixteenths(zero_code: int, dtype: torch.dtype) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5000, 4), dtype=np.uint8)
    registers = ptx_model.run(even_ptx(zero_code, dtype), [words(stored)], 4)
    found = np.stack(registers, 1).view(np.int16).reshape(-1, 2, 4)
    sixteenths = table([(code - zero_code) / 16 for code in range(16)], dtype)
    assert np.array_equal(found[:, 0], sixteenths[stored & 15])
    assert np.array_equal(found[:, 1], sixteenths[stored >> 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "shift"), [(4, 0), (3, 0), (3, 4), (2, 0)])
def test_codes_are_counted_from_a_start(bits: int, shift: int, dtype: torch.dtype) -> None:
    low, high = np.random.default_rng(0).integers(0, 256, (2, 5000, 4), dtype=np.uint8)
    planes = [words(high), np.full(5000, shift, np.uint32)] if bits == 3 else []
    num_segments = 2 if bits == 4 else 4
    text = counted_ptx(bits, dtype)
    registers = ptx_model.run(text, [words(low), *planes], 2 * num_segments)
    found = np.stack(registers, 1).view(np.int16).reshape(-1, num_segments, 4)
    numbers = table([STARTS[dtype][0] + code / 16 for code in range(16)], dtype)
    for segment in range(num_segments):
        code = low >> 4 * segment & 15 if bits == 4 else low >> 2 * segment & 3
        if bits == 3:
            code = code | (high >> shift + segment & 1) << 2
        assert np.array_equal(found[:, segment], numbers[code])


@pytest.mark.parametrize(("bits", "others"), [(4, 3), (3, 15), (2, 7)])
def test_counting_is_cheaper_than_a_table(bits: int, others: int) -> None:
    text = counted_ptx(bits, torch.bfloat16)
    assert text.count("prmt.b32") == (4 if bits == 4 else 8)
    moves = text.count("mov.b32")
    found = text.count(";") - text.count(".reg") - text.count("prmt.b32") - moves
    assert found == others


@pytest.mark.parametrize("divisor", [7, 8, 7.5])
def test_even_levels_need_no_table(divisor: float) -> None:
    levels = torch.tensor([(code - 8) / divisor for code in range(16)]).tolist()
    step, zero_code = even_step(levels)
    assert zero_code == 8
    assert step == pytest.approx(1 / divisor, rel=1e-6)
    assert decoder(levels, torch.bfloat16) == (even_ptx(8, torch.bfloat16), 16 * step, 0)


@pytest.mark.parametrize(
    "levels",
    [NF4, TABLES["fp4"], tuple(range(16, 0, -1)), tuple(code + 0.5 for code in range(-8, 8))],
    ids=["nf4", "fp4", "descending", "no zero"],
)
def test_other_levels_are_looked_up(levels) -> None:
    assert even_step(levels) == (0.0, 0)
    assert decoder(levels, torch.float16) == (lookup_ptx(levels, torch.float16), 1, 0)


def test_fewer_bits_are_looked_up_and_more_need_no_text() -> None:
    for levels in (THREE_BITS, TWO_BITS, (-1.0, 0.0, 1.0, 2.0)):
        assert decoder(levels, torch.bfloat16) == (lookup_ptx(levels, torch.bfloat16), 1, 0)
    assert decoder((), torch.bfloat16) == ("", 128, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "int3", "int2", "int4_sym", "int3_sym"])
def test_with_zero_points_even_levels_are_counted(name: str, dtype: torch.dtype) -> None:
    levels = COUNTED[name]
    made = decoder(levels, dtype, zeros=True)
    assert made.ptx == counted_ptx(code_bits(levels), dtype)
    numbers = [STARTS[dtype][0] + code / 16 for code in range(len(levels))]
    assert [(number - made.base) * made.unit for number in numbers] == list(levels)


@pytest.mark.parametrize("levels", [NF4, COUNTED["int2_sym"]], ids=["nf4", "halves"])
def test_with_zero_points_others_are_looked_up(levels) -> None:
    assert decoder(levels, torch.float16, zeros=True) == decoder(levels, torch.float16)
