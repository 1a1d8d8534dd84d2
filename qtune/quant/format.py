"""What a number format is, and how it is found.

A format is one file in `formats/` whose name is the word used in recipes. It says how a group of
weights becomes codes and back; packing, double quantization of the scales and kernels are written
once over that.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qtune.errors import UserError


class Format(Protocol):
    """A number format: weights [..., G] <-> codes, uint8 [..., G], and a scale per group [...].

    A code decodes to `levels[code] * scale` with 4 bits and, where `levels` is empty, to
    (code - 128) / 127 * scale with 8 bits. All three functions also work on `meta` tensors.
    """

    bits: int
    levels: tuple[float, ...]
    encodes_stored_scales: bool
    """Whether codes are chosen for the scales as stored in 8 bits, and not for those fitted."""

    def fit(self, groups: Tensor) -> Tensor:
        """Scales, float32 [...], of float32 groups [..., G]."""
        ...

    def encode(self, groups: Tensor, scales: Tensor) -> Tensor:
        """Codes, uint8 [..., G], of float32 groups [..., G] given their scales [...]."""
        ...

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weights, float32 [..., G], of codes [..., G] and scales [...]."""
        ...


def format_names() -> list[str]:
    """The words for formats in a recipe: the file names in `formats/`."""
    return sorted(p.stem for p in (Path(__file__).parent / "formats").glob("[!_]*.py"))


def load_format(name: str) -> Format:
    """The format of that name; raises UserError for an unknown one."""
    if name not in format_names():
        raise UserError(f"unknown format '{name}'; there are: {', '.join(format_names())}")
    found: Format = import_module(f"qtune.quant.formats.{name}").FORMAT
    return found
