"""The squared error of formats on normal values, in parts of their variance."""

from collections.abc import Callable

import pytest
import torch

from qtune.quant import clip
from qtune.quant.format import load_format

GaussianError = Callable[..., float]


@pytest.fixture
def gaussian_error() -> GaussianError:
    """A function of a format's name, whether ranges are searched, and the group size."""
    groups = torch.randn(1 << 18, generator=torch.Generator().manual_seed(5))

    def error(name: str, *, search: bool, group_size: int = 64) -> float:
        fmt, own = load_format(name), groups.view(-1, group_size)
        params = clip.best(fmt, own) if search else fmt.fit(own)
        back = fmt.decode(fmt.encode(own, params), params).double()
        return float((back - own).square().sum() / own.double().square().sum())

    return error
