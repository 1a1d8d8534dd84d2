"""Which part of its range a group is quantized over: the one with the least squared error.

Levels that reach to the largest magnitude are far apart; giving up on it brings them closer to all
the other weights. With 2 bits that is the difference between a usable result and none. Errors may
be weighted by what each input is worth to the layer's outputs (arXiv 2306.00978, 2210.17323).
"""

from functools import cache

import torch
from torch import Tensor

from qtune.quant.format import Format, Params
from qtune_kernels.clip_errors import clip_errors

# shares of the range that are tried: from all of it down to 43 %
KEEPS = tuple(1 - k * 0.6 / 20 for k in range(20))
# weights for which one share is tried at a time: on the CPU the temporaries stay in the cache,
# elsewhere the calls are few
SLICE = 1 << 16
DEVICE_SLICE = 1 << 22


def fitted(fmt: Format, groups: Tensor, importance: Tensor | None = None) -> Params:
    """The parameters [N] of float32 groups [N, G]: searched for where the format does, else fit."""
    return best(fmt, groups, importance) if fmt.searches else fmt.fit(groups)


def best(fmt: Format, groups: Tensor, importance: Tensor | None = None) -> Params:
    """The parameters [N] of float32 groups [N, G] with the least squared error over KEEPS.

    `importance`, [N, G] or what broadcasts to it, weighs the errors. Raises ValueError for groups
    with infinities or NaN.
    """
    rows = max(1, (SLICE if groups.is_cpu else DEVICE_SLICE) // groups.shape[-1])
    weights = None if importance is None else importance.expand_as(groups)
    parts = [
        _best(fmt, groups[at : at + rows], None if weights is None else weights[at : at + rows])
        for at in range(0, len(groups), rows)
    ]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    scales = torch.cat([part.scales for part in parts])
    return Params(scales, torch.cat(zeros) if zeros else None)


def _best(fmt: Format, groups: Tensor, importance: Tensor | None) -> Params:
    tried = fmt.fit(groups, _keeps(groups.device))  # [K, N]
    if not groups.is_meta and not tried.scales.isfinite().all():
        raise ValueError("a scale is not finite: the weight holds infinities or NaN")
    errors = clip_errors(groups, *tried, fmt.levels, importance)
    # of equal errors the first: the largest share
    best = errors.argmin(0, keepdim=True)
    scales = tried.scales.gather(0, best).squeeze(0)
    zeros = None if tried.zeros is None else tried.zeros.gather(0, best).squeeze(0)
    return Params(scales, zeros)


@cache
def _keeps(device: torch.device) -> Tensor:
    """KEEPS, float32 [K, 1]."""
    with torch.inference_mode(False):
        return torch.tensor(KEEPS, device=device).unsqueeze(1)
