"""What a method is, and how it is found.

A method chooses the codes of one layer, given its 16-bit weight and what its inputs are like. It is
one file in `methods/` whose name is the word used in recipes, and works in weight space alone: it
knows no model, so whatever measured the Hessian may come from anywhere.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

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
        **given: Tensor,
    ) -> dict[str, Tensor]:
        """What `layer.load` takes, see `quantize`; `given` are channel factors, if any."""
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
    channels: Tensor | None = None,
) -> dict[str, Tensor]:
    """The uint8 tensors, as `layer.load` takes them, of a dense weight [O, I] by the method set.

    `hessian`, float32 [I, I], is the mean of x^T x over the layer's plain inputs; `nearest` needs
    none. What was wrong with it goes to `note`. `channels` [I] are factors that `shared_channels`
    chose. Raises UserError where the Hessian is not finite.
    """
    # vectors of eight weights share a code, so they are rounded together
    name = "ldlq" if layer.storage.format == "e8p" else settings.method
    method: Method = import_module(f"qtune.quant.methods.{name}").METHOD
    given = {} if channels is None else {"channels": channels}
    return method(layer, weight, hessian, settings, note, **given)


def shared_channels(
    layers: Sequence[QuantLinear],
    weights: Sequence[Tensor],
    hessian: Tensor,
    settings: Quant,
) -> Tensor | None:
    """Channel factors [I] for all layers of one input, dense weights [O, I]; None: the method, or
    a layer, has none.
    """
    module = import_module(f"qtune.quant.methods.{settings.method}")
    shared: Any = getattr(module, "SHARED", None)
    found: Tensor | None = shared and shared(layers, weights, hessian, settings)
    return found
