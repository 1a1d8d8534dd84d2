"""What a method is, and how it is found.

A method chooses the codes of one layer, given its 16-bit weight and what its inputs are like. It is
one file in `methods/` whose name is the word used in recipes, and works in weight space alone: it
knows no model, so whatever measured the Hessian may come from anywhere.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qtune.progress import say
from qtune.quant.hessian import Note
from qtune.quant.linear import QuantLinear
from qtune.recipe_quant import Quant


class Method(Protocol):
    """A way to choose codes."""

    def __call__(
        self,
        layer: QuantLinear,
        weight: Tensor,
        hessian: Tensor | None,
        settings: Quant,
        note: Note,
    ) -> dict[str, Tensor]:
        """What `layer.load` takes, see `quantize`."""
        ...


def method_names() -> list[str]:
    """The files in `methods/`; the words of a recipe are among them."""
    return sorted(p.stem for p in (Path(__file__).parent / "methods").glob("[!_]*.py"))


def quantize(
    layer: QuantLinear,
    weight: Tensor,
    hessian: Tensor | None,
    settings: Quant,
    note: Note = say,
) -> dict[str, Tensor]:
    """The uint8 tensors, as `layer.load` takes them, of a dense weight [O, I] by the method set.

    `hessian`, float32 [I, I], is the mean of x^T x over the layer's plain inputs; `nearest` needs
    none. What was wrong with it goes to `note`. Raises UserError where it is not finite.
    """
    return _method(layer, settings)(layer, weight, hessian, settings, note)


def _method(layer: QuantLinear, settings: Quant) -> Method:
    # vectors of eight weights share a code, so they are rounded together
    name = "ldlq" if layer.storage.format == "e8p" else settings.method
    found: Method = import_module(f"qtune.quant.methods.{name}").METHOD
    return found
