"""Random quantized matrices for the kernels' tests, and code books of 4, 3 and 2 bits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtune_kernels.packing import code_bits, pack
from qtune_kernels.scales import Scales, dequantize_scales, quantize_scales

# arXiv 2305.14314, appendix E, as float32
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# without order or symmetry, to show any mix-up
THREE_BITS = (-1.0, 0.3, -0.55, 0.0, 0.125, -0.2, 0.81, 1.0)
TWO_BITS = (0.35, -1.0, 1.0, -0.1)
TABLES = {"nf4": NF4, "3 bits": THREE_BITS, "2 bits": TWO_BITS, "8 bits": ()}


class Sample(NamedTuple):
    """Arguments of the ops, and the weights [O, I] in float64, computed code by code."""

    packed: Tensor
    scales: Scales
    levels: tuple[float, ...]
    group_size: int
    weights: Tensor

    def to(self, device: torch.device) -> "Sample":
        """The same with its tensors on a device."""
        scales = Scales(*(part.to(device) for part in self.scales))
        return self._replace(
            packed=self.packed.to(device), scales=scales, weights=self.weights.to(device)
        )


def sample(
    shape: tuple[int, int],
    levels: Sequence[float] = NF4,
    group_size: int = 64,
    *,
    largest: float = 0.025,
    seed: int = 0,
) -> Sample:
    """A matrix of random codes, of 8 bits where `levels` is empty, with weights up to `largest`."""
    generator = torch.Generator().manual_seed(seed)
    num_weights = shape[0] * shape[1]
    bits = code_bits(levels)
    codes = torch.randint(0, 1 << bits, (num_weights,), generator=generator, dtype=torch.uint8)
    num_groups = -(-num_weights // group_size)
    spread = torch.rand(num_groups, generator=generator) * 0.8 + 0.2
    scales = quantize_scales(spread * largest)
    values = levels or [(code - 128) / 127 for code in range(256)]
    weights = torch.tensor(values, dtype=torch.float64)[codes.long()]
    weights *= dequantize_scales(scales).double().repeat_interleave(group_size)[:num_weights]
    packed = pack(codes, bits)
    return Sample(packed, scales, tuple(levels), group_size, weights.view(shape))


def error(result: Tensor, truth: Tensor) -> float:
    """The relative root mean square error against a float64 truth."""
    result, truth = result.detach().double(), truth.detach()
    return float((result - truth).norm() / truth.norm())
