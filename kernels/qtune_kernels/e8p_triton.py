"""The CUDA kernel of `e8p_dequantize`: a thread decodes whole words and stores their eight weights.

Patterns come from a table of 1 KiB, which stays in the first-level cache; signs are bits of the
word.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtune_kernels.e8p_book import STEP, pattern_words

# words of a program: 8 for each thread of its 4 warps
WORDS = 1024


def dequantize_into(flat: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Write the weights into `flat`, [O I] of bfloat16, float16 or float32."""
    words = packed.view(torch.int16)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(triton.cdiv(len(words), WORDS),)](
            words,
            scale,
            pattern_words(packed.device),
            flat,
            len(words),
            STEP=STEP,
            WORDS=WORDS,
            num_warps=4,
            enable_fp_fusion=False,
        )


@triton.jit
def _dequantize_kernel(
    words_ptr,
    scale_ptr,
    patterns_ptr,
    weights_ptr,
    num_words,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * WORDS
    at = first + tl.arange(0, WORDS)
    word = tl.load(words_ptr + at, mask=at < num_words, other=0).to(tl.int32) & 0xFFFF
    pattern = tl.load(patterns_ptr + (word & 0xFF))
    signs = word >> 8 & 0x7F
    folded = signs ^ signs >> 4
    folded ^= folded >> 2
    # the sign of the last number is what the others leave to an even sum
    signs |= ((folded ^ folded >> 1 ^ pattern) & 1) << 7
    step = tl.load(scale_ptr) * STEP
    shift = (1 - (word >> 14 & 2)).to(tl.float32) * step
    place = tl.arange(0, 8)[None, :]
    size = (pattern[:, None] >> 4 * place & 14).to(tl.float32)
    minus = signs[:, None] << 31 - place & -0x80000000
    signed = (size.to(tl.int32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)
    # one rounding, of a sum that is exact but for the scale: the bits of the plain version
    weight = tl.fma(signed, step, tl.broadcast_to(shift[:, None], signed.shape))
    live = (at < num_words)[:, None]
    weights_at = weights_ptr + at[:, None] * 8 + place
    tl.store(weights_at, weight.to(weights_ptr.dtype.element_ty), mask=live)
