import gguf
import pytest
import torch

from qtune.quant.kquants.bits import eight_pairs, half, planes, sixteen


@pytest.mark.parametrize("run", [1, 4, 32])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_put_runs_above_each_other(bits: int, run: int) -> None:
    codes = torch.randint(1 << bits, (3, 256), dtype=torch.uint8)
    made = planes(codes, bits, run)
    assert made.shape == (3, 32 * bits)
    expected = torch.zeros_like(made)
    for row in range(3):
        for at in range(256):
            stripe, place = divmod(at, run * 8 // bits)
            byte = stripe * run + place % run
            expected[row, byte] += int(codes[row, at]) << bits * (place // run)
    assert torch.equal(made, expected)


def test_eight_pairs_are_read_back() -> None:
    scales, minima = torch.randint(64, (2, 20, 8), dtype=torch.uint8)
    read = gguf.quants.Q4_K.get_scale_min(eight_pairs(scales, minima).numpy())
    assert [part.tolist() for part in read] == [scales.tolist(), minima.tolist()]


def test_sixteen_numbers_share_bytes_as_documented() -> None:
    scales = torch.randint(64, (20, 16), dtype=torch.uint8)
    made = sixteen(scales).int()
    low = [made[:, at % 8] >> 4 * (at // 8) & 15 for at in range(16)]
    high = [made[:, 8 + at % 4] >> 2 * (at // 4) & 3 for at in range(16)]
    assert torch.equal(torch.stack(low, 1) + 16 * torch.stack(high, 1), scales.int())


def test_half_is_the_bytes_of_16_bit_floats() -> None:
    assert half(torch.tensor([1.0, -2.0])).tolist() == [[0x00, 0x3C], [0x00, 0xC0]]
