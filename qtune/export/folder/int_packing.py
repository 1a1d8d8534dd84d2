"""Where integer codes lie in the int32 words of GPTQ, AWQ and compressed-tensors.

The three hold the same numbers, weight = (code - zero) * scale with unsigned codes, and differ in
which of them share a word. That is all a `Container` says, so that a layout can be read here and
compared with its library. Words are filled from their lowest bits on.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class Container:
    """The layout of one library: codes of a matrix [O, I], zeros and scales of its groups."""

    inputs_first: bool
    """Matrices are stored [I, O], and scales and zeros [I/G, O]."""
    codes_share: Literal["inputs", "outputs"]
    """Neighbours in which dimension share a word; zeros are shared by outputs everywhere."""
    order: tuple[int, ...] | None = None
    """Which of the neighbours each place of a word holds, the lowest first; None: in order."""
    zero_shift: int = 0
    """What is added to a zero point when it is stored."""


GPTQ = Container(inputs_first=True, codes_share="inputs", zero_shift=-1)
AWQ = Container(inputs_first=True, codes_share="outputs", order=(0, 2, 4, 6, 1, 3, 5, 7))
COMPRESSED_TENSORS = Container(inputs_first=False, codes_share="inputs")


def pack_codes(codes: Tensor, bits: int, container: Container) -> Tensor:
    """The words, int32, of codes, uint8 [O, I], in the container's shape.

    The shared dimension must be a multiple of the codes in a word.
    """
    outputs_share = container.codes_share == "outputs"
    return _stored(
        _words(codes.T if outputs_share else codes, bits, container), outputs_share, container
    )


def pack_zeros(zeros: Tensor, bits: int, container: Container) -> Tensor:
    """The words, int32, of zero points, uint8 [O, I/G], in the container's shape.

    O must be a multiple of the codes in a word. A shifted zero point wraps around, as GPTQ's 0.
    """
    shifted = zeros.T + container.zero_shift & (1 << bits) - 1
    return _stored(_words(shifted, bits, container), True, container)


def place_scales(scales: Tensor, container: Container) -> Tensor:
    """Scales [O, I/G] in the container's shape, contiguous."""
    return (scales.T if container.inputs_first else scales).contiguous()


def codes_per_word(bits: int) -> int:
    """Codes of so many bits in one word."""
    return WORD_BITS // bits


def _words(rows: Tensor, bits: int, container: Container) -> Tensor:
    """Words [N, M / codes per word] of rows of numbers [N, M], uint8; neighbours share a word."""
    places = rows.unflatten(-1, (-1, codes_per_word(bits)))
    if container.order is not None:
        places = places[..., list(container.order)]
    if bits == 4:
        places = places[..., 0::2] | places[..., 1::2] << 4
    # bytes of a word from the lowest on, as safetensors and every machine that torch runs on
    words: Tensor = places.contiguous().view(torch.int32)
    return words.squeeze(-1)


def _stored(words: Tensor, of_outputs: bool, container: Container) -> Tensor:
    """Words of rows of outputs [I, O/n], or of inputs [O, I/n], in the container's order."""
    return (words if of_outputs == container.inputs_first else words.T).contiguous()
