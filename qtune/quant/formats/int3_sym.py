"""INT3 without zero points: integers from -4 to 3."""

from qtune.quant.grids import Symmetric

FORMAT = Symmetric(bits=3)
