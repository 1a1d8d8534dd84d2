"""Random quantized matrices, ours and bitsandbytes': the same codes and scales in both layouts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtune.quant.formats.nf4 import LEVELS as NF4
from qtune_kernels.packing import from_bitsandbytes, pack, unpack
from qtune_kernels.scales import SCALE_GROUP, Scales, dequantize_scales, quantize_scales

# one code book for each width, in the order of their bits; none is symmetric, to show any mix-up
LEVELS: dict[int, tuple[float, ...]] = {
    8: (),
    4: NF4,
    3: (-1.0, 0.3, -0.55, 0.0, 0.125, -0.2, 0.81, 1.0),
    2: (0.35, -1.0, 1.0, -0.1),
}
INT4 = tuple((code - 8) / 8 for code in range(16))


class Weight(NamedTuple):
    """A matrix [O, I] in codes, as the ops take it."""

    packed: Tensor
    scales: Scales
    levels: tuple[float, ...]
    group_size: int
    shape: tuple[int, int]
    bits: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the ops want of it, in their order, up to the group size."""
        return (self.packed, *self.scales, self.levels, self.group_size)

    @property
    def size_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.packed, *self.scales))

    def exact(self) -> Tensor:
        """The weights, float32 [O, I], decoded code by code: one rounding each, on any device."""
        num = self.shape[0] * self.shape[1]
        codes = unpack(self.packed, self.bits, num).int()
        scales = dequantize_scales(self.scales).repeat_interleave(self.group_size)[:num]
        if not self.levels:
            return ((codes - 128) * (scales / 127)).view(self.shape)
        levels = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
        return (levels[codes] * scales).view(self.shape)


def random_weight(
    shape: tuple[int, int], bits: int, group_size: int, device: torch.device
) -> Weight:
    """A matrix of random codes and scales, weights up to 0.025."""
    num = shape[0] * shape[1]
    codes = torch.randint(0, 1 << bits, (num,), dtype=torch.uint8, device=device)
    scales = quantize_scales((torch.rand(-(-num // group_size), device=device) + 0.25) * 0.02)
    return Weight(pack(codes, bits), scales, LEVELS[bits], group_size, shape, bits)


def random_pair(shape: tuple[int, int], device: torch.device) -> tuple[Weight, Tensor, Any]:
    """NF4 with nested scales: ours, and the bytes and the state of bitsandbytes for the same."""
    from bitsandbytes.functional import quantize_4bit

    dense = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    packed, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state.state2.blocksize == SCALE_GROUP
    scales = Scales(state.absmax, state.state2.absmax, state.offset.float().view(1))
    ours = from_bitsandbytes(packed, shape[0] * shape[1])
    return Weight(ours, scales, NF4, 64, shape, 4), packed, state
