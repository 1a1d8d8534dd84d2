"""E8P: eight weights share a word of 16 bits, which names a point of a dense lattice.

QuIP#, arXiv 2402.04396, section 4. The best format at 2 bits, for weights that look normal: so its
layers rotate both inputs and outputs (`qtune.quant.vector_linear`), and one scale does for a whole
matrix. A code of this protocol is one number of a point, so it takes more than 2 bits by itself;
layers store words.
"""

import torch
from torch import Tensor

from qtune.quant.format import Params
from qtune_kernels.e8p_book import LENGTH, STEP, decode_words, nearest_words

# what normal weights are scaled to: their points are then nearest
DEVIATION = 1.02
# the largest number of a point, in steps
_LARGEST = 11
_SMALLEST_SCALE = 1e-12


class E8P:
    """The 2-bit code book for vectors of eight; G must be a multiple of eight."""

    bits = 2
    levels = tuple(step * STEP for step in range(-_LARGEST, _LARGEST + 1, 2))
    scale_kind = "float"
    zero_kind = None
    encodes_stored_scales = True
    searches = False
    length = LENGTH
    """Weights that are encoded together."""

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """One scale for each group, from its root mean square; `keep` multiplies it."""
        deviation = groups.square().mean(-1).sqrt()
        return Params((deviation * (keep / DEVIATION)).clamp_min(_SMALLEST_SCALE))

    def encode(self, groups: Tensor, params: Params) -> Tensor:
        """Codes [..., G], each the place of a number in `levels`, of the nearest points."""
        vectors = (groups / params.scales.unsqueeze(-1)).reshape(-1, LENGTH)
        steps = decode_words(nearest_words(vectors))
        return ((steps + _LARGEST) // 2).to(torch.uint8).view(groups.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights [..., G] of codes."""
        return (codes.float() * 2 - _LARGEST) * STEP * params.scales.unsqueeze(-1)


FORMAT = E8P()
