"""What the types of GGUF blocks are made of: groups, levels, and codes for scales and minima.

A weight is d s q, or d s q - e m: q is a level of its own; s and m are whole numbers of its group,
d and e 16-bit floats of its block. In blocks of one group s and m are 1.
"""

from dataclasses import dataclass

from qtune.quant.kquants.levels import Integers, Levels, Table

# dense in the middle, where most weights are
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Kind:
    """A block of `groups` groups of `size` weights; `steps` are the whole numbers s, `minima` m."""

    type_size: int
    """Bytes of a block."""
    groups: int
    size: int
    levels: Levels
    steps: Integers
    minima: Integers | None = None

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        return self.groups * self.size


_ONE = Integers(1, 1)
_SIX_BITS = Integers(0, 63)

KINDS = {
    "Q8_0": Kind(34, 1, 32, Integers(-127, 127), _ONE),
    "Q5_0": Kind(22, 1, 32, Integers(-16, 15), _ONE),
    "Q4_0": Kind(18, 1, 32, Integers(-8, 7), _ONE),
    "IQ4_NL": Kind(18, 1, 32, Table(UNEVEN), _ONE),
    "Q5_1": Kind(24, 1, 32, Integers(0, 31), _ONE, _ONE),
    "Q4_1": Kind(20, 1, 32, Integers(0, 15), _ONE, _ONE),
    "Q6_K": Kind(210, 16, 16, Integers(-32, 31), Integers(-128, 127)),
    "Q5_K": Kind(176, 8, 32, Integers(0, 31), _SIX_BITS, _SIX_BITS),
    "Q4_K": Kind(144, 8, 32, Integers(0, 15), _SIX_BITS, _SIX_BITS),
    "Q3_K": Kind(110, 16, 16, Integers(-4, 3), Integers(-32, 31)),
    "Q2_K": Kind(84, 16, 16, Integers(0, 3), Integers(0, 15), Integers(0, 15)),
}
