"""LM2: the four levels with the least squared error for normal values (Lloyd-Max).

Found for blocks of 64 values over their largest magnitude, errors weighted by its square. They lose
.118 of such values' variance, where two bits of NF4's kind lose .317.
"""

from qtune.quant.grids import Table

LEVELS = (-0.588597575, -0.173038913, 0.173038913, 0.588597575)

FORMAT = Table(LEVELS)
