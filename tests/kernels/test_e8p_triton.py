"""The kernel that decodes E8P against the plain version, bit by bit, guarded."""

import pytest
import torch

from qtune_kernels.e8p import e8p_dequantize, e8p_linear

kernels = pytest.importorskip("qtune_kernels.e8p_triton")

GUARD = 64


def stored(num_words: int) -> torch.Tensor:
    return torch.randint(0, 256, (2 * num_words,), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_words", [1, 40, kernels.WORDS + 3])
def test_weights_are_the_same_bits(num_words, dtype, device) -> None:
    packed, scale = stored(num_words), torch.tensor([0.0317])
    around = torch.full((8 * num_words + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    kernels.dequantize_into(around[GUARD:-GUARD], packed.to(device), scale.to(device))
    expected = e8p_dequantize(packed, scale, num_words, 8, dtype).view(-1)
    assert torch.equal(around[GUARD:-GUARD].cpu(), expected)
    assert around[:GUARD].isnan().all() and around[-GUARD:].isnan().all()


def test_every_word_is_decoded(device) -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    packed, scale = words.view(torch.uint8), torch.tensor([4.0])
    flat = torch.empty(8 << 16, device=device)
    kernels.dequantize_into(flat, packed.to(device), scale.to(device))
    assert torch.equal(
        flat.cpu(), e8p_dequantize(packed, scale, 1 << 16, 8, torch.float32).view(-1)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_ops_run_this_kernel_on_a_gpu(device) -> None:
    packed, scale = stored(64 * 32).to(device), torch.tensor([0.03], device=device)
    x = torch.randn(5, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    torch.library.opcheck(e8p_linear, (x, packed, scale, 64))
