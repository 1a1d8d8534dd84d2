"""INT4: integers from 0 to 15 and a whole zero point for each group.

So none of a group's range is wasted. The grid of GPTQ and AWQ checkpoints (arXiv 2210.17323,
2306.00978).
"""

from qtune.quant.grids import Affine

# a smaller range lowers the error of weights and raises that of outputs, see docs/quality.md
FORMAT = Affine(bits=4, searches=False)
