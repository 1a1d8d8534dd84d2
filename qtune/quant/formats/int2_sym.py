"""INT2 without zero points: -3/2, -1/2, 1/2 and 3/2, since a level at 0 would waste one of four."""

from qtune.quant.grids import Symmetric

FORMAT = Symmetric(bits=2)
