import pytest
import torch

from qtune_kernels.packing import (
    from_bitsandbytes,
    pack,
    packed_bytes,
    to_bitsandbytes,
    unpack,
)

SIZES = [1, 63, 64, 65, 127, 128, 129, 640, 1001]


def random_codes(num_weights: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (num_weights,), dtype=torch.uint8)


def test_a_byte_holds_two_codes_that_are_64_apart() -> None:
    codes = torch.arange(256, dtype=torch.uint8) % 16
    codes[3], codes[67], codes[128], codes[192] = 9, 2, 5, 14
    packed = pack(codes, 4)
    assert packed.numel() == 128
    assert packed[3] == 9 | 2 << 4
    assert packed[64] == 5 | 14 << 4


@pytest.mark.parametrize("bits", [4, 8])
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


def test_rows_of_whole_runs_are_packed_one_by_one() -> None:
    codes = random_codes(3 * 256, 4).view(3, 256)
    assert torch.equal(pack(codes, 4), torch.cat([pack(row, 4) for row in codes]))


def test_meta_tensors_are_packed_too() -> None:
    codes = torch.empty(5, 100, dtype=torch.uint8, device="meta")
    assert pack(codes, 4).numel() == packed_bytes(500, 4) == 256
