"""Packed words against the formulas of each layout, written out, and the libraries' own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtune.export.folder.int_packing import (
    AWQ,
    COMPRESSED_TENSORS,
    GPTQ,
    codes_per_word,
    pack_codes,
    pack_zeros,
    place_scales,
)

OUTPUTS, INPUTS, GROUPS = 16, 64, 2
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def numbers(bits: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    shape = OUTPUTS, width
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def field(words: Tensor, row: int, column: int, place: int, bits: int) -> int:
    """One number of a word."""
    return int(words[row, column]) >> bits * place & (1 << bits) - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_shares_words_between_inputs(bits: int) -> None:
    codes, per = numbers(bits, INPUTS), codes_per_word(bits)
    words = pack_codes(codes, bits, GPTQ)
    assert words.shape == (INPUTS // per, OUTPUTS) and words.dtype == torch.int32
    for o in range(OUTPUTS):
        found = [field(words, i // per, o, i % per, bits) for i in range(INPUTS)]
        assert found == codes[o].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_stores_zeros_less_one(bits: int) -> None:
    zeros, per = numbers(bits, GROUPS), codes_per_word(bits)
    words = pack_zeros(zeros, bits, GPTQ)
    assert words.shape == (GROUPS, OUTPUTS // per)
    for g in range(GROUPS):
        found = [field(words, g, o // per, o % per, bits) for o in range(OUTPUTS)]
        assert found == [(int(zero) - 1) % (1 << bits) for zero in zeros[:, g]]
    middle = torch.full((8, 1), 8, dtype=torch.uint8)
    assert pack_zeros(middle, 4, GPTQ).tolist() == [[0x77777777]]


def test_awq_shares_words_between_outputs_in_its_order() -> None:
    codes, zeros = numbers(4, INPUTS), numbers(4, GROUPS)
    for words, expected in ((pack_codes(codes, 4, AWQ), codes), (pack_zeros(zeros, 4, AWQ), zeros)):
        assert words.shape == (expected.shape[1], OUTPUTS // 8) and words.is_contiguous()
        for i in range(expected.shape[1]):
            for place, output in enumerate(AWQ_ORDER):
                found = [field(words, i, word, place, 4) for word in range(OUTPUTS // 8)]
                assert found == expected[output::8, i].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_own_words(bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    codes, zeros, middle = numbers(bits, INPUTS), numbers(bits, GROUPS), 1 << bits - 1
    words = pack_codes(codes, bits, COMPRESSED_TENSORS)
    signed = (codes.int() - middle).to(torch.int8)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)
    of_zeros = pack_zeros(zeros, bits, COMPRESSED_TENSORS)
    signed = (zeros.int() - middle).to(torch.int8)
    assert torch.equal(of_zeros, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize(
    ("container", "place"),
    [(GPTQ, Tensor.t), (AWQ, Tensor.t), (COMPRESSED_TENSORS, lambda scales: scales)],
)
def test_scales_lie_as_zeros_do(container, place: Callable[[Tensor], Tensor]) -> None:
    scales = torch.rand(OUTPUTS, GROUPS)
    found = place_scales(scales, container)
    assert torch.equal(found, place(scales)) and found.is_contiguous()
