"""All words of the code book decoded on the CPU: the points of `e8p_book`, times the scale."""

import pytest
import torch

from qtune_kernels.cpu import e8p
from qtune_kernels.cpu.e8p import dequantize_into, dequantizes
from qtune_kernels.cpu.jit import available
from qtune_kernels.e8p_book import STEP, decode_words

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

WORDS = torch.arange(1 << 16, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_word(dtype) -> None:
    scale = torch.tensor([0.0137])
    found = torch.full((8 << 16,), torch.nan, dtype=dtype)
    dequantize_into(found, WORDS.to(torch.int16).view(torch.uint8), scale)
    truth = decode_words(WORDS).float() * (scale * STEP)
    assert torch.equal(found, truth.to(dtype).flatten())


def test_threads_share_the_words() -> None:
    words = torch.randint(0, 256, (2 * 8 * 13,), dtype=torch.uint8)
    alone, together = torch.empty(8 * 8 * 13), torch.empty(8 * 8 * 13)
    dequantize_into(alone, words, torch.ones(1))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    dequantize_into(together, words, torch.ones(1))
    torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_magnitudes_and_the_parity_of_their_sum() -> None:
    table = e8p.magnitudes().view(torch.int8).view(256, 8)
    odd, magnitudes = table[:, 0] & 1, table & ~1
    # a half, three halves and five halves in quarters
    assert set(magnitudes.unique().tolist()) == {2, 6, 10}
    assert torch.equal(odd.long(), ((magnitudes - 2) // 4).sum(1) % 2)
    assert len(magnitudes.unique(dim=0)) == 256


def test_what_is_left_to_plain_torch() -> None:
    assert dequantizes(torch.empty(128))
    assert not dequantizes(torch.empty(72))
    assert not dequantizes(torch.empty(64, dtype=torch.float16))
    assert not dequantizes(torch.empty(64, device="meta"))
