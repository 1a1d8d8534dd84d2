"""Random quantized matrices for the kernels' tests, code books of 4, 3 and 2 bits, and variants."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtune_kernels.packing import code_bits, pack
from qtune_kernels.scales import (
    ZERO_BITS,
    Scales,
    dequantize_scales,
    linear_scales,
    pack_zeros,
    quantize_scales,
)

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
# levels that are one apart
COUNTED = {
    "int4": tuple(float(code) for code in range(16)),
    "int3": tuple(float(code) for code in range(8)),
    "int2": tuple(float(code) for code in range(4)),
    "int4_sym": tuple(float(code - 8) for code in range(16)),
    "int3_sym": tuple(float(code - 4) for code in range(8)),
    "int2_sym": (-1.5, -0.5, 0.5, 1.5),
}


class Variant(NamedTuple):
    """How scales and zero points are stored."""

    scales: str = "dynamic"
    zeros: str | None = None

    def __str__(self) -> str:
        return f"{self.scales} scales, {self.zeros or 'no'} zeros"


PLAIN = Variant()
# every kind of either at least once, and what formats use
VARIANTS = [
    Variant("linear"),
    Variant("half"),
    Variant("linear", "codes"),
    Variant("half", "half"),
    Variant("float", "float"),
    Variant("dynamic", "float"),
]


class Sample(NamedTuple):
    """Arguments of the ops, and the weights [O, I] in float64, computed code by code."""

    packed: Tensor
    scales: Scales
    levels: tuple[float, ...]
    group_size: int
    weights: Tensor

    def to(self, device: torch.device) -> "Sample":
        """The same with its tensors on a device."""
        scales = Scales(*(None if part is None else part.to(device) for part in self.scales))
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
    variant: Variant = PLAIN,
) -> Sample:
    """A matrix of random codes, of 8 bits where `levels` is empty, with weights up to `largest`.

    With zero points up to 16 times that.
    """
    generator = torch.Generator().manual_seed(seed)
    num_weights = shape[0] * shape[1]
    bits = code_bits(levels)
    codes = torch.randint(0, 1 << bits, (num_weights,), generator=generator, dtype=torch.uint8)
    num_groups = -(-num_weights // group_size)
    spread = torch.rand(num_groups, generator=generator) * 0.8 + 0.2
    values = levels or [code - 128 for code in range(256)]
    scales = stored_scales(spread * (largest / max(map(abs, values))), variant.scales)
    weights = torch.tensor(values, dtype=torch.float64)[codes.long()]
    if variant.zeros:
        zeros, stored = random_zeros(num_groups, bits, variant.zeros, generator)
        weights -= zeros.double().repeat_interleave(group_size)[:num_weights]
        scales = scales._replace(zeros=stored)
    weights *= dequantize_scales(scales).double().repeat_interleave(group_size)[:num_weights]
    return Sample(pack(codes, bits), scales, tuple(levels), group_size, weights.view(shape))


def stored_scales(scales: Tensor, kind: str) -> Scales:
    """Scales, float32 [S], stored in that way."""
    if kind in ("dynamic", "linear"):
        return (quantize_scales if kind == "dynamic" else linear_scales)(scales)
    nothing = scales.new_empty(0)
    return Scales(scales.half() if kind == "half" else scales, nothing, nothing)


def random_zeros(
    num_zeros: int, bits: int, kind: str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Zero points of that kind, float32 [num_zeros], and as stored."""
    if kind == "codes":
        count = 1 << ZERO_BITS[bits]
        zeros = torch.randint(0, count, (num_zeros,), generator=generator)
        return zeros.float(), pack_zeros(zeros, bits)
    zeros = torch.rand(num_zeros, generator=generator) * (1 << bits) / 2
    stored = zeros.half() if kind == "half" else zeros
    return stored.float(), stored


def error(result: Tensor, truth: Tensor) -> float:
    """The relative root mean square error against a float64 truth."""
    result, truth = result.detach().double(), truth.detach()
    return float((result - truth).norm() / truth.norm())
