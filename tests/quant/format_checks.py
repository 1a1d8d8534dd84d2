"""What formats of one family share, checked by name: integers of both kinds, Lloyd-Max levels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtune.quant.format import Params, load_format
from qtune.quant.storage import Storage
from qtune.quant.weight import dequantize, quantize, storage_bytes
from qtune_kernels.scales import dequantize_scales, unpack_zeros


def bits_of_a_weight(name: str) -> float:
    """Bits in storage, for a weight of 1024 x 1024 in groups of 64."""
    return sum(storage_bytes((1024, 1024), Storage(name)).values()) * 8 / 2**20


def check_zero_points_are_whole_and_scales_halves(name: str) -> None:
    """What is stored of integers from 0 on means (level - zero) * scale, in float64."""
    fmt, weight = load_format(name), _weight()
    most = len(fmt.levels) - 1
    made = quantize(weight, Storage(name), 64)
    scales = dequantize_scales(made.scales)
    assert torch.equal(scales.half().float(), scales)
    assert made.scales.zeros is not None
    zeros = unpack_zeros(made.scales.zeros, fmt.bits, 480)
    assert set(zeros.tolist()) <= set(range(most + 1))
    back = dequantize(made, fmt, 64, (96, 320), torch.float32).view(-1, 64).double()
    steps, starts = scales.double().unsqueeze(1), zeros.double().unsqueeze(1)
    levels = (back / steps + starts).round()
    assert levels.min() == 0 and levels.max() == most
    assert torch.allclose(back, (levels - starts) * steps, rtol=1e-6, atol=0)


def check_scales_are_halves_of_both_signs(name: str) -> None:
    """Scales of integers around 0, as they are stored, are 16-bit floats of either sign."""
    scales = dequantize_scales(quantize(_weight(), Storage(name), 64).scales)
    assert torch.equal(scales.half().float(), scales)
    assert 0.3 < (scales > 0).float().mean() < 0.7


def gain_of_signs(name: str) -> float:
    """The squared error with scales that have signs, over that with positive ones."""
    fmt = load_format(name)
    groups = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))

    def error(params: Params) -> float:
        return float((fmt.decode(fmt.encode(groups, params), params) - groups).square().sum())

    return error(fmt.fit(groups)) / error(Params(groups.abs().amax(1) / max(fmt.levels)))


def check_levels_are_symmetric_and_ascend(levels: Sequence[float], bits: int) -> None:
    """One level for each code, the same on both sides of 0."""
    values = torch.tensor(levels)
    assert len(levels) == 1 << bits
    assert torch.equal(values, -values.flip(0)) and values.diff().min() > 0


def check_each_level_is_the_mean_of_what_it_stands_for(name: str) -> None:
    """The condition of Lloyd and Max, on samples."""
    fmt = load_format(name)
    groups = torch.randn(1 << 16, 64, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(groups)
    largest = params.scales.double().unsqueeze(1)
    # an error counts as much as its group is large
    ratios, weights = groups.double() / largest, largest.square().expand_as(groups)
    codes = fmt.encode(groups, params).long().flatten()
    total = torch.zeros(len(fmt.levels), dtype=torch.float64)
    mass = total.index_add(0, codes, weights.flatten())
    mean = total.index_add(0, codes, (ratios * weights).flatten()) / mass
    assert torch.allclose(mean, torch.tensor(fmt.levels).double(), atol=2e-3)


def _weight() -> Tensor:
    return torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * 0.02
