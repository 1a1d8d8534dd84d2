"""What a number format is, and how it is found.

A format is one file in `formats/` whose name is the word used in recipes. It says how a group of
weights becomes codes and back; the search for a smaller range, methods, packing, scales in 8 bits
and kernels are written once over that.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from qtune.errors import UserError

ScaleKind = Literal["dynamic", "linear", "half", "float"]
ZeroKind = Literal["codes", "half", "float"]


class Params(NamedTuple):
    """What groups [..., G] share: `scales` float32 [...], and `zeros` float32 [...] or None.

    A code stands for (levels[code] - zero) * scale; with 8 bits for (code - 128 - zero) * scale.
    """

    scales: Tensor
    zeros: Tensor | None = None


class Format(Protocol):
    """A number format: weights [..., G] <-> codes, uint8 [..., G], and the Params of the groups.

    All three functions also work on `meta` tensors.
    """

    bits: int
    levels: tuple[float, ...]
    """What codes stand for, before zero and scale; empty with 8 bits."""
    scale_kind: ScaleKind
    """How scales are stored, see `qtune_kernels.scales`."""
    zero_kind: ZeroKind | None
    """How zero points are stored; None: there are none."""
    encodes_stored_scales: bool
    """Whether codes are chosen for the parameters as stored, and not for those fitted."""
    searches: bool
    """Whether a smaller range than the group's is looked for where no Hessian tells what for."""

    def fit(self, groups: Tensor, keep: float | Tensor = 1.0) -> Params:
        """The parameters of float32 groups [..., G] that cover a share `keep` of their range.

        Shares [K, 1] give the parameters [K, N] of groups [N, G] for each of them.
        """
        ...

    def encode(self, groups: Tensor, params: Params) -> Tensor:
        """Codes, uint8 [..., G], of float32 groups [..., G] given their parameters [...]."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights, float32 [..., G], of codes [..., G] and parameters [...]."""
        ...


def format_names() -> list[str]:
    """The words for formats in a recipe: the file names in `formats/`."""
    return sorted(p.stem for p in (Path(__file__).parent / "formats").glob("[!_]*.py"))


@cache
def load_format(name: str) -> Format:
    """The format of that name; raises UserError for an unknown one."""
    if name not in format_names():
        raise UserError(f"unknown format '{name}'; there are: {', '.join(format_names())}")
    found: Format = import_module(f"qtune.quant.formats.{name}").FORMAT
    return found
