"""Ternary: -1, 0 or 1 times the mean magnitude of the group (BitNet b1.58, arXiv 2402.17764).

So models that were trained for it keep their weights, with `group_size: tensor` the very ones. Of
others a quarter of the square is lost. Codes have 2 bits; the fourth stands for 1 too and is never
chosen.
"""

from qtune.quant.grids import Table, mean_magnitude

FORMAT = Table((-1.0, 0.0, 1.0, 1.0), searches=False, scale=mean_magnitude)
