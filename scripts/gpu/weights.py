"""Random quantized matrices, ours and bitsandbytes': the same codes and scales in both layouts."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qtune.quant.formats.nf4 import LEVELS as NF4
from qtune_kernels.packing import from_bitsandbytes, pack, unpack
from qtune_kernels.scales import (
    SCALE_GROUP,
    ZERO_BITS,
    Scales,
    dequantize_scales,
    linear_scales,
    pack_zeros,
    quantize_scales,
    unpack_zeros,
)

# one code book for each width, in the order of their bits; none is symmetric, to show any mix-up
LEVELS: dict[int, tuple[float, ...]] = {
    8: (),
    4: NF4,
    3: (-1.0, 0.3, -0.55, 0.0, 0.125, -0.2, 0.81, 1.0),
    2: (0.35, -1.0, 1.0, -0.1),
}
INT4 = tuple((code - 8) / 8 for code in range(16))


class Kind(NamedTuple):
    """How scales and zero points are stored; with the latter, levels are whole numbers from 0."""

    scales: Literal["dynamic", "linear", "half"] = "dynamic"
    zeros: Literal["codes", "half"] | None = None


KINDS = (Kind(), Kind("linear"), Kind("linear", "codes"), Kind("half", "half"))
# of bytes there are no whole zero points
KINDS_OF_BYTES = (Kind(), Kind("linear"), Kind("half"))


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
        tensors = [tensor for tensor in (self.packed, *self.scales) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def exact(self) -> Tensor:
        """The weights, float32 [O, I], decoded code by code: rounded the same on any device."""
        num = self.shape[0] * self.shape[1]
        codes = unpack(self.packed, self.bits, num).int()
        table = self.levels or [float(code - 128) for code in range(256)]
        levels = torch.tensor(table, dtype=torch.float32, device=codes.device)[codes]
        if self.scales.zeros is not None:
            num_groups = self.scales.codes.numel()
            levels -= self._by_weights(unpack_zeros(self.scales.zeros, self.bits, num_groups))
        return (levels * self._by_weights(dequantize_scales(self.scales))).view(self.shape)

    def _by_weights(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group_size)[: self.shape[0] * self.shape[1]]


def random_weight(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    device: torch.device,
    kind: Kind = KINDS[0],
) -> Weight:
    """A matrix of random codes and scales, weights without zero points up to 0.025."""
    num = shape[0] * shape[1]
    num_groups = -(-num // group_size)
    codes = torch.randint(0, 1 << bits, (num,), dtype=torch.uint8, device=device)
    levels = LEVELS[bits]
    if kind.zeros:
        levels = tuple(float(code) for code in range(1 << bits))
    largest = max(map(abs, levels)) if levels else 127.0
    spread = (torch.rand(num_groups, device=device) + 0.25) * (0.02 / largest)
    scales = _stored_scales(spread, kind)._replace(zeros=_zeros(num_groups, bits, kind, device))
    return Weight(pack(codes, bits), scales, levels, group_size, shape, bits)


def _stored_scales(scales: Tensor, kind: Kind) -> Scales:
    if kind.scales == "half":
        nothing = scales.new_empty(0)
        return Scales(scales.half(), nothing, nothing)
    return quantize_scales(scales) if kind.scales == "dynamic" else linear_scales(scales)


def _zeros(num_groups: int, bits: int, kind: Kind, device: torch.device) -> Tensor | None:
    """Random zero points as they are stored."""
    if kind.zeros is None:
        return None
    if kind.zeros == "half":
        return (torch.rand(num_groups, device=device) * (1 << bits)).half()
    zeros = torch.randint(0, 1 << ZERO_BITS[bits], (num_groups,), device=device)
    return pack_zeros(zeros, bits)


def random_pair(shape: tuple[int, int], device: torch.device) -> tuple[Weight, Tensor, Any]:
    """NF4 with nested scales: ours, and the bytes and the state of bitsandbytes for the same."""
    from bitsandbytes.functional import quantize_4bit

    dense = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    packed, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state.state2.blocksize == SCALE_GROUP
    scales = Scales(state.absmax, state.state2.absmax, state.offset.float().view(1))
    ours = from_bitsandbytes(packed, shape[0] * shape[1])
    return Weight(ours, scales, NF4, 64, shape, 4), packed, state
