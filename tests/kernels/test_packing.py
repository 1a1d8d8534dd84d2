import pytest
import torch

from qtune_kernels.packing import (
    code_bits,
    from_bitsandbytes,
    pack,
    packed_bytes,
    run_weights,
    to_bitsandbytes,
    unpack,
)

SIZES = [1, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 640, 1025]
BITS = [8, 4, 3, 2]


def random_codes(num_weights: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (num_weights,), dtype=torch.uint8)


def test_a_byte_holds_two_codes_that_are_64_apart() -> None:
    codes = torch.arange(256, dtype=torch.uint8) % 16
    codes[3], codes[67], codes[128], codes[192] = 9, 2, 5, 14
    packed = pack(codes, 4)
    assert packed.numel() == 128
    assert packed[3] == 9 | 2 << 4
    assert packed[64] == 5 | 14 << 4


def stored_code(packed: torch.Tensor, bits: int, index: int) -> int:
    """One code, by the sentences of kernels/README.md."""
    segment, j = divmod(index, 64)
    if bits == 8:
        return int(packed[index])
    if bits == 4:
        return int(packed[64 * (segment // 2) + j]) >> 4 * (segment % 2) & 15
    if bits == 2:
        return int(packed[64 * (segment // 4) + j]) >> 2 * (segment % 4) & 3
    run, segment = divmod(segment, 8)
    low = int(packed[192 * run + 64 * (segment // 4) + j]) >> 2 * (segment % 4) & 3
    return low | (int(packed[192 * run + 128 + j]) >> segment & 1) << 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_weights", [1, 130, 700])
def test_every_code_lies_where_the_layout_says(num_weights: int, bits: int) -> None:
    codes = random_codes(num_weights, bits)
    packed = pack(codes, bits)
    room = packed.numel() * 8 // bits
    filled = codes.tolist() + [0] * (room - num_weights)
    assert [stored_code(packed, bits, index) for index in range(room)] == filled


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_weights", SIZES)
def test_codes_come_back(num_weights: int, bits: int) -> None:
    codes = random_codes(num_weights, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(num_weights, bits)
    assert torch.equal(unpack(packed, bits, num_weights), codes)


@pytest.mark.parametrize("num_weights", SIZES)
def test_bitsandbytes_bytes_hold_the_same_codes(num_weights: int) -> None:
    codes = random_codes(num_weights, 4)
    theirs = to_bitsandbytes(pack(codes, 4), num_weights)
    assert theirs.shape == (-(-num_weights // 2), 1)
    assert torch.equal(theirs[: num_weights // 2, 0] >> 4, codes[0 : num_weights // 2 * 2 : 2])
    assert torch.equal(theirs[: num_weights // 2, 0] & 15, codes[1::2])
    assert torch.equal(from_bitsandbytes(theirs, num_weights), pack(codes, 4))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("num_weights", [64, 65, 1001])
def test_bytes_that_bitsandbytes_made_come_back(kind: str, num_weights: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):
        theirs, state = functional.quantize_4bit(torch.randn(num_weights), quant_type=kind)
    zero_code = state.code.tolist().index(0.0)
    ours = from_bitsandbytes(theirs, num_weights)
    assert torch.equal(to_bitsandbytes(ours, num_weights, zero_code), theirs)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_whole_runs_are_packed_one_by_one(bits: int) -> None:
    codes = random_codes(3 * 512, bits).view(3, 512)
    assert torch.equal(pack(codes, bits), torch.cat([pack(row, bits) for row in codes]))


@pytest.mark.parametrize(("bits", "size"), [(8, 500), (4, 256), (3, 192), (2, 128)])
def test_meta_tensors_are_packed_too(bits: int, size: int) -> None:
    codes = torch.empty(5, 100, dtype=torch.uint8, device="meta")
    assert pack(codes, bits).numel() == packed_bytes(500, bits) == size
    assert unpack(pack(codes, bits), bits, 500).shape == (500,)


def test_the_number_of_levels_tells_the_bits() -> None:
    assert [code_bits([0.0] * number) for number in (0, 16, 8, 4)] == BITS
    assert [run_weights(bits) for bits in BITS] == [1, 128, 512, 256]
    with pytest.raises(KeyError):
        code_bits([0.0] * 5)
