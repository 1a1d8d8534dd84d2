"""Nearest: each weight takes the level next to it, whatever the others do; needs no data."""

from torch import Tensor

from qtune.quant.hessian import Note
from qtune.quant.linear import QuantLinear
from qtune.recipe_quant import Quant


def nearest(
    layer: QuantLinear, weight: Tensor, hessian: Tensor | None, settings: Quant, note: Note
) -> dict[str, Tensor]:
    """What `layer.load` takes for a dense weight [O, I]; nothing else is looked at."""
    return layer.pack(weight)


METHOD = nearest
