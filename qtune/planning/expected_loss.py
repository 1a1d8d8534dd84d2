"""What a model of some size loses in some number format, as far as others have measured it.

For choosing between models that nobody has run yet: a larger one in fewer bits or a smaller one in
more. Measurements at two sizes, SmolLM2-135M (our own, WikiText-2) and Llama-2-7B (perplexities of
GPTQ, QuIP#, EfficientQAT and llama.cpp), are joined by a power law; small models lose more. What is
gained by more parameters is the slope between Llama-2-7B and 13B; above 7B no form is taken to lose
less than there. So 13B in 4 and 3 bits comes out before 7B in 8 and 16, and in 2 bits behind 7B in
4, as has been measured. Numbers are nats a token before training on the task; for one's own model
`qtune sense` and `qtune compare` measure them.
"""

import math
from dataclasses import dataclass

from qtune.recipe import Quant

SMALL, LARGE = 0.135e9, 6.74e9
# nats a token by which loss falls when a model has e times the parameters: log(5.47 / 4.88) nats
# between 6.74 and 13.02 billion
GAIN_OF_SIZE = 0.174
# below so many parameters, nothing under 4 bits is proposed unless it is named
LEAST_FOR_LOW_BITS = 1e9


@dataclass(frozen=True)
class Measured:
    """Nats a token that are lost, at SMALL and at LARGE."""

    small: float
    large: float

    def at(self, num_parameters: float) -> float:
        """What a model with so many parameters is taken to lose."""
        exponent = math.log(self.large / self.small) / math.log(LARGE / SMALL)
        # nothing is made of a slope beyond what it was measured between
        return self.small * math.pow(min(num_parameters, LARGE) / SMALL, exponent)


# each code for itself, by bits; what the loss is of grids, fitted tables are somewhat better
NEAREST = {
    8: Measured(0.0033, 0.0005),
    4: Measured(0.2148, 0.0447),
    3: Measured(1.077, 0.197),
    2: Measured(7.14, 4.37),
}
NF4 = Measured(0.1889, 0.0393)
GPTQ = {
    8: Measured(0.0033, 0.0005),
    4: Measured(0.1043, 0.0252),
    3: Measured(0.5244, 0.1397),
    2: Measured(2.2611, 1.341),
}
ROTATED_GPTQ = {
    8: Measured(0.0033, 0.0005),
    4: Measured(0.0422, 0.0194),
    3: Measured(0.2185, 0.0896),
    2: Measured(1.2048, 0.810),
}
E8P = Measured(1.0888, 0.473)


def expected_loss(quant: Quant, bits: int, num_parameters: int) -> float:
    """Nats a token that the model loses in this form, against its 16-bit one."""
    if quant.format is None:
        return 0.0
    return _measured(quant, bits).at(num_parameters)


def gain_of_size(num_parameters: int) -> float:
    """Nats a token that a 16-bit model gains on one of SMALL parameters of its family."""
    return GAIN_OF_SIZE * math.log(num_parameters / SMALL)


def _measured(quant: Quant, bits: int) -> Measured:
    if quant.format == "e8p":
        return E8P
    if quant.method == "gptq":
        return (ROTATED_GPTQ if quant.rotate else GPTQ)[bits]
    return NF4 if quant.format == "nf4" else NEAREST[bits]
