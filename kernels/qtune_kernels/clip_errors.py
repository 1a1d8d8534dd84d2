"""Squared errors of groups for several choices of scales and zero points: what a search compares.

Each choice means to encode and decode all weights, of which nothing is kept but a sum for each
group. On the CPU a kernel (cpu/clip_errors.py) does this in registers; elsewhere, and on
processors without AVX-512, it is a look-up and plain arithmetic, one choice after the other. The
codes are those of `quantize.encode`, the weights those of `dequantize`; sums are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtune_kernels.nearest import SMALLEST_SCALE, boundaries


@torch.library.custom_op("qtune::clip_errors", mutates_args=())
def clip_errors(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    importance: Tensor | None,
) -> Tensor:
    """Squared errors, float32 [K, N], of float32 groups [N, G] for K choices of parameters.

    `scales` and `zeros` are float32 [K, N], `levels` as in `dequantize`. Each square is multiplied
    by `importance`, float32 [N, G] or what broadcasts to it.
    """
    return _plain(groups, scales, zeros, levels, importance)


@clip_errors.register_fake
def _(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    importance: Tensor | None,
) -> Tensor:
    return torch.empty_like(scales)


@clip_errors.register_kernel("cpu")
def _(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    importance: Tensor | None,
) -> Tensor:
    from qtune_kernels.cpu import clip_errors as native

    if native.takes(groups):
        return native.clip_errors(groups, scales, zeros, tuple(levels), importance)
    return _plain(groups, scales, zeros, levels, importance)


def _plain(
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    levels: Sequence[float],
    importance: Tensor | None,
) -> Tensor:
    errors = torch.empty_like(scales)
    for choice, steps in enumerate(scales.unsqueeze(2)):
        shifts = 0.0 if zeros is None else zeros[choice].unsqueeze(1)
        made = (_nearest(groups, steps, shifts, levels) - shifts) * steps
        squares = (made - groups).square_()
        errors[choice] = (squares if importance is None else squares * importance).sum(1)
    return errors


def _nearest(
    groups: Tensor, scales: Tensor, zeros: Tensor | float, levels: Sequence[float]
) -> Tensor:
    """The nearest levels, float32 [N, G], to groups over scales [N, 1], plus zeros."""
    if not levels:
        ratios = groups / scales.where(scales != 0, 1)
        return (ratios + zeros).round_().clamp_(-127, 127)
    bounds, codes = (table.to(groups.device) for table in boundaries(levels))
    ascending = torch.tensor(levels, dtype=torch.float32, device=groups.device)[codes]
    ratios = groups * (1 / scales.where(scales.abs() > SMALLEST_SCALE, SMALLEST_SCALE))
    return ascending[torch.bucketize(ratios + zeros, bounds)]
