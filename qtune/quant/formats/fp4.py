"""FP4: floating point numbers of 4 bits, scaled by the largest magnitude of the group.

One sign, two exponent and one mantissa bits, as bitsandbytes lays them out; codes, scales and
decoded weights are its own bit for bit. QLoRA (arXiv 2305.14314) finds it worse than NF4.
"""

from qtune.quant.grids import Table

# fmt: off
LEVELS = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)
# fmt: on

FORMAT = Table(LEVELS, scale_kind="dynamic", encodes_stored_scales=False, searches=False)
