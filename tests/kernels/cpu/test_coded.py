"""What kernels are told of a quantized matrix."""

import pytest
import torch
from stored_samples import VARIANTS, stored_sample

from qtune_kernels.cpu import coded


@pytest.mark.parametrize(("bits", "scales", "zeros"), VARIANTS)
def test_every_way_of_storing_is_known(bits, scales, zeros) -> None:
    made = stored_sample((4, 64), bits, scales, zeros, 32)
    layout = coded.layout(*made[1:4])
    assert layout == (bits, 32, scales, zeros) and coded.decodes(layout)


@pytest.mark.parametrize(
    "change",
    [
        {"scales": torch.float64},
        {"scales": torch.bfloat16},
        {"zeros": torch.int8},
        {"group_size": 15},
        {"bits": 8, "zeros": torch.uint8},
    ],
)
def test_what_is_not_known(change) -> None:
    layout = coded.layout(*stored_sample((4, 64), 4)[1:4])
    assert coded.decodes(layout) and not coded.decodes(layout._replace(**change))


def test_addresses_of_what_there_is() -> None:
    made = stored_sample((4, 64), 2, torch.float16, torch.uint8, 32)
    packed, codes, _, _, zeros, _, levels, num_groups = coded.places(*made[:3])
    assert packed == made.packed.data_ptr() and codes == made.scales.codes.data_ptr()
    assert zeros == made.scales.zeros.data_ptr() and num_groups == 8
    assert levels == coded.level_table(made.levels).data_ptr()
    assert coded.places(*stored_sample((4, 64), 2)[:3])[4] == 0


def test_levels_are_repeated_to_a_register() -> None:
    assert coded.level_table((0, 1, 2, 3)).tolist() == [0.0, 1.0, 2.0, 3.0] * 4
    assert not coded.level_table(()).any()
