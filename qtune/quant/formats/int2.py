"""INT2: integers from 0 to 3 and a whole zero point for each group.

So none of a group's range is wasted. The grid of GPTQ and AWQ checkpoints (arXiv 2210.17323,
2306.00978).
"""

from qtune.quant.grids import Affine

FORMAT = Affine(bits=2)
