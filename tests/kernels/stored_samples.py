"""Random quantized matrices in every way of storing scales and zeros, decoded as the contract says.

Nothing here is made by the functions that store: parts are drawn as they lie in memory, and the
weights are worked out from them one float32 rounding at a time.
"""

import torch
from samples import NF4, THREE_BITS, TWO_BITS, Sample
from torch import Tensor

from qtune_kernels.packing import pack
from qtune_kernels.scales import Scales, dynamic_map

LEVELS = {4: NF4, 3: THREE_BITS, 2: TWO_BITS, 8: ()}
SCALE_KINDS = (torch.uint8, torch.int8, torch.float16, torch.float32)
ZERO_KINDS = (None, torch.uint8, torch.float16, torch.float32)
# bits of a code, scales, zeros: all but whole zeros of 8 bits, which do not exist
VARIANTS = [
    (bits, scales, zeros)
    for bits in LEVELS
    for scales in SCALE_KINDS
    for zeros in ZERO_KINDS
    if not (bits == 8 and zeros == torch.uint8)
]


def stored_sample(
    shape: tuple[int, int],
    bits: int,
    scales: torch.dtype = torch.uint8,
    zeros: torch.dtype | None = None,
    group_size: int = 64,
) -> Sample:
    """A matrix of random codes; its weights are float32 numbers, in float64."""
    num_weights = shape[0] * shape[1]
    num_groups = -(-num_weights // group_size)
    codes = torch.randint(0, 1 << bits, (num_weights,), dtype=torch.uint8)
    levels = torch.tensor(LEVELS[bits])[codes.long()] if bits < 8 else codes.float() - 128
    stored, steps = _scales(num_groups, scales)
    kept, subtracted = _zeros(num_groups, zeros, bits)
    if subtracted is not None:
        levels -= subtracted.repeat_interleave(group_size)[:num_weights]
    weights = levels * steps.repeat_interleave(group_size)[:num_weights]
    parts = stored._replace(zeros=kept)
    return Sample(pack(codes, bits), parts, LEVELS[bits], group_size, weights.double().view(shape))


def _scales(num_groups: int, kind: torch.dtype) -> tuple[Scales, Tensor]:
    """Scales as stored, and what they are."""
    if kind.is_floating_point:
        steps = (torch.rand(num_groups) * 0.02 + 0.005).to(kind)
        return Scales(steps, torch.empty(0), torch.empty(0)), steps.float()
    coarse = torch.arange(num_groups) // 256
    if kind == torch.int8:
        codes = torch.randint(-128, 128, (num_groups,), dtype=torch.int8)
        units = 2.0 ** -torch.randint(12, 15, (int(coarse[-1]) + 1,))
        fine = codes.float()
    else:
        codes = torch.randint(0, 256, (num_groups,), dtype=torch.uint8)
        units = torch.rand(int(coarse[-1]) + 1) * 0.01
        fine = dynamic_map(codes.device)[codes.long()]
    offset = torch.full((1,), 2.0**-5)
    return Scales(codes, units, offset), fine * units[coarse] + offset


def _zeros(num_groups: int, kind: torch.dtype | None, bits: int) -> tuple[Tensor | None, ...]:
    """Zeros as stored, and what they are."""
    if kind is None:
        return None, None
    if kind.is_floating_point:
        zeros = torch.randn(num_groups).to(kind)
        return zeros, zeros.float()
    field = 2 if bits == 2 else 4
    whole = torch.randint(0, 1 << field, (num_groups,))
    stored = torch.zeros(-(-num_groups * field // 8), dtype=torch.int64)
    for group, zero in enumerate(whole.tolist()):
        stored[group * field // 8] |= zero << group * field % 8
    return stored.to(torch.uint8), whole.float()
