"""NF4: sixteen quantiles of a normal distribution, scaled by the largest magnitude of the group.

QLoRA, arXiv 2305.14314, section 3 and appendix E. Codes, scales and decoded weights are those of
bitsandbytes bit for bit, ties included: a value halfway between two levels takes the lower one.
"""

from qtune.quant.grids import Table

# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on

# bitsandbytes chooses codes for the scales as they were before they are stored in 8 bits
FORMAT = Table(LEVELS, scale_kind="dynamic", encodes_stored_scales=False, searches=False)
