import pytest

from qtune.errors import UserError
from qtune.recipe import Calibration, Quant


@pytest.mark.parametrize("size", [0, 8, 48, 96])
def test_a_group_has_a_power_of_two_weights(size):
    with pytest.raises(UserError, match=f"group_size \\({size}\\).* try 64"):
        Quant(group_size=size)


@pytest.mark.parametrize("size", [16, 64, "row", "tensor"])
def test_groups_of_these_sizes_exist(size):
    assert Quant(group_size=size).group_size == size


def test_rotation_goes_with_gptq():
    with pytest.raises(UserError, match=r"set quant\.method: gptq"):
        Quant(rotate=True)
    assert Quant(rotate=True, method="gptq").rotate


def test_e8p_needs_gptq():
    with pytest.raises(UserError, match=r"needs quant\.method: gptq"):
        Quant(format="e8p")


def test_integer_activations_are_for_integer_weights():
    with pytest.raises(UserError, match=r"quant\.format: int8"):
        Quant(activations="int8")
    with pytest.raises(UserError, match="in all layers"):
        Quant(format="int8", activations="int8", layers={"down_proj": "int4"})


def test_a_method_needs_a_format():
    with pytest.raises(UserError, match=r"needs a quant\.format"):
        Quant(format=None, method="gptq")


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"length": 8}, {"damping": 0.0}])
def test_calibration_needs_text(wrong):
    with pytest.raises(UserError, match=r"quant\.calibration"):
        Calibration(**wrong)
