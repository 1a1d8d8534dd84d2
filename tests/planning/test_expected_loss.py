import math

import pytest

from qtune.planning.expected_loss import LARGE, SMALL, Measured, expected_loss, gain_of_size
from qtune.recipe import Quant

FORMS = {
    16: Quant(format=None),
    8: Quant(format="int8"),
    4: Quant(format="int4", method="gptq", rotate=True),
    3: Quant(format="int3", method="gptq", rotate=True),
    2: Quant(format="int2", method="gptq", rotate=True),
}


def total(bits, num_parameters):
    return expected_loss(FORMS[bits], bits, num_parameters) - gain_of_size(num_parameters)


def test_both_measurements_are_met_and_joined_by_a_power_law():
    found = Measured(0.4, 0.1)
    assert found.at(SMALL) == pytest.approx(0.4)
    assert found.at(LARGE) == pytest.approx(0.1)
    assert found.at(math.sqrt(SMALL * LARGE)) == pytest.approx(0.2)
    assert expected_loss(FORMS[16], 16, 10**9) == 0


def test_a_larger_model_in_few_bits_wins_down_to_3():
    """Llama-2, WikiText-2: 13B w4 4.93, w3 5.12, w2 5.96; 7B 16-bit 5.47, w4 5.53, w2 6.86."""
    small, large = 6_738_000_000, 13_016_000_000
    assert total(4, large) < total(8, small)
    assert total(3, large) < total(16, small)
    assert total(2, large) > total(4, small)


@pytest.mark.parametrize("size", [SMALL, 1e9, LARGE, 7e10])
def test_fewer_bits_lose_more_and_methods_help(size):
    losses = [expected_loss(form, bits, int(size)) for bits, form in FORMS.items()]
    assert losses == sorted(losses)
    for bits in (4, 3, 2):
        plain = Quant(format=f"int{bits}")
        gptq = Quant(format=f"int{bits}", method="gptq")
        found = [expected_loss(q, bits, int(size)) for q in (plain, gptq, FORMS[bits])]
        assert found == sorted(found, reverse=True)
    e8p = expected_loss(Quant(format="e8p", method="gptq"), 2, int(size))
    assert e8p < expected_loss(FORMS[2], 2, int(size))
    assert expected_loss(Quant(), 4, int(size)) < expected_loss(Quant(format="int4"), 4, int(size))
