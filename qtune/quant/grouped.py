"""A matrix as groups of weights in flat order, and their parameters where some inputs matter more.

Groups end inside rows where the row length is no multiple of their size.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from qtune.quant import clip
from qtune.quant.format import Format, Params


def groups_of(matrix: Tensor, group_size: int) -> Tensor:
    """Groups [S, G] of a matrix [O, I], the last one filled up with zeros."""
    return pad(matrix.reshape(-1), (0, -matrix.numel() % group_size)).view(-1, group_size)


def fit_groups(fmt: Format, weight: Tensor, group_size: int, importance: Tensor) -> Params:
    """The parameters [S] of the groups of a float32 weight [O, I].

    The share of each group's range is the one with the least squared error, weighted by
    `importance` [I].
    """
    weights = groups_of(importance.expand_as(weight), group_size)
    return clip.best(fmt, groups_of(weight, group_size), weights)


def encoded(fmt: Format, weight: Tensor, params: Params, group_size: int) -> Tensor:
    """The nearest codes, uint8 [O, I], of a float32 weight [O, I] for parameters [S]."""
    codes = fmt.encode(groups_of(weight, group_size), params)
    return codes.view(-1)[: weight.numel()].view(weight.shape)


def decoded(fmt: Format, codes: Tensor, params: Params, group_size: int) -> Tensor:
    """The weights, float32 [O, I], of codes [O, I] for parameters [S]."""
    weights = fmt.decode(groups_of(codes, group_size), params)
    return weights.view(-1)[: codes.numel()].view(codes.shape)


def params_at(params: Params, rows: Tensor, columns: Tensor, width: int, size: int) -> Params:
    """The parameters of some weights of a matrix with rows of `width`, of those [S] of all groups.

    They have the shape that `rows` and `columns` broadcast to.
    """
    at = (rows * width + columns).div(size, rounding_mode="floor")
    return changed(params, lambda part: part[at])


def changed(params: Params, change: Callable[[Tensor], Tensor]) -> Params:
    """The parameters with the same done to scales and zeros."""
    return Params(change(params.scales), None if params.zeros is None else change(params.zeros))
