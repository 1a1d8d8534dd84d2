"""INT4 without zero points: integers from -8 to 7."""

from qtune.quant.grids import Symmetric

# a smaller range lowers the error of weights and raises that of outputs, see docs/quality.md
FORMAT = Symmetric(bits=4, searches=False)
