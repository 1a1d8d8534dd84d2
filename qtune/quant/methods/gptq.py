"""GPTQ: codes chosen column by column, later columns making up for the errors of earlier ones.

arXiv 2210.17323. Scales are stored in 8 bits, and codes have to suit them as they are stored, so
there are two passes: the first finds each group's parameters, fitted to its weights as earlier
errors have changed them; the second chooses codes for these parameters as they decode. Columns go
in order of their importance, whole groups at a time, the most important group first: that is
activation order without an index stored for every column, and still each group is fitted at the
moment its first column is reached. Last, each column is rounded anew given all the others: the
first ones could not know what later ones would leave.
"""

from torch import Tensor, arange, empty_like, stack

from qtune.quant import clip
from qtune.quant.columns import Columns, ParamsOf
from qtune.quant.format import Params
from qtune.quant.grouped import changed, fit_groups, params_at
from qtune.quant.hessian import Note, inverse_root
from qtune.quant.linear import QuantLinear
from qtune.recipe_quant import Quant


def gptq(
    layer: QuantLinear, weight: Tensor, hessian: Tensor | None, settings: Quant, note: Note
) -> dict[str, Tensor]:
    """What `layer.load` takes for a dense weight [O, I], given its Hessian [I, I]."""
    if hessian is None:
        raise ValueError("GPTQ needs a Hessian")
    inner, hessian = layer.inner_weight(weight.float()), layer.inner_hessian(hessian.float())
    order = column_order(hessian.diagonal(), layer.group_size)
    ordered = hessian[order][:, order]
    regular, root = inverse_root(ordered, settings.calibration.damping, note)
    columns = Columns(layer.format, inner.T[order].contiguous(), regular.float(), root.float())
    settled = layer.settle(_fitted(columns, order, layer.group_size))
    params_of = _stored(settled.params, order, layer)
    codes = columns.rounded(params_of)
    columns.round_anew(codes, params_of)
    in_place = empty_like(codes)
    in_place[order] = codes
    return layer.store(in_place.T.contiguous(), settled)


METHOD = gptq


def column_order(importance: Tensor, group_size: int) -> Tensor:
    """Columns, int64 [I], by falling importance [I]; those of a group stay together.

    Where groups do not end with rows, a column belongs to many, and goes by itself.
    """
    if len(importance) % group_size:
        return importance.argsort(descending=True)
    groups = importance.view(-1, group_size)
    first = groups.sum(1).argsort(descending=True)
    within = groups.argsort(1, descending=True)
    return (first.unsqueeze(1) * group_size + within[first]).reshape(-1)


def _fitted(columns: Columns, order: Tensor, group_size: int) -> Params:
    """The parameters [S] of all groups, each fitted where its first column is reached."""
    importance = columns.hessian.diagonal()
    if len(order) % group_size or len(order) == group_size:
        # no group begins behind an error
        inner, in_place = empty_like(columns.weights), empty_like(importance)
        inner[order], in_place[order] = columns.weights, importance
        return fit_groups(columns.fmt, inner.T, group_size, in_place)
    found: list[Params] = []

    def fit(block: slice, weights: Tensor) -> Params:
        found.append(clip.best(columns.fmt, weights.T.contiguous(), importance[block]))
        return changed(found[-1], lambda part: part.expand(len(weights), -1))

    columns.rounded(fit, group_size)
    scales = stack([part.scales for part in found], 1)
    zeros = [part.zeros for part in found if part.zeros is not None]
    # groups were reached in another order than they are stored in
    reached = order[::group_size].argsort()
    whole = Params(scales, stack(zeros, 1) if zeros else None)
    return changed(whole, lambda part: part[:, reached].reshape(-1))


def _stored(params: Params, order: Tensor, layer: QuantLinear) -> ParamsOf:
    """Gives columns their parameters, of those [S] of all groups."""
    rows = arange(layer.out_features, device=order.device)

    def find(block: slice, weights: Tensor) -> Params:
        at = order[block].unsqueeze(1)
        return params_at(params, rows, at, layer.in_features, layer.group_size)

    return find
