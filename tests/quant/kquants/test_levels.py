import pytest
import torch

from qtune.quant.kquants.kinds import UNEVEN
from qtune.quant.kquants.levels import Integers, Levels, Table

LEVELS = [(Integers(-4, 3), range(-4, 4)), (Integers(0, 15), range(16)), (Table(UNEVEN), UNEVEN)]
IDS = ["signed", "from 0", "uneven"]


@pytest.mark.parametrize(("levels", "values"), LEVELS, ids=IDS)
def test_nearest_of_all_values(levels: Levels, values: range) -> None:
    ratios = torch.linspace(-150, 150, 4001)
    known = torch.tensor(list(values)).float()
    found = levels.nearest_(ratios.clone())
    distances = (ratios.unsqueeze(1) - known).abs().amin(1)
    # a table tells eighths apart
    assert ((found - ratios).abs() - distances).max() < 0.13
    assert set(found.tolist()) <= set(known.tolist())


@pytest.mark.parametrize(("levels", "values"), LEVELS, ids=IDS)
def test_codes_count_the_values(levels: Levels, values: range) -> None:
    codes = levels.codes(torch.tensor(list(values)).float())
    assert codes.dtype == torch.uint8
    assert codes.tolist() == list(range(len(values)))


def test_ends_meet_the_last_whole_numbers_but_keep_half_of_few() -> None:
    ends = Integers(-8, 7).ends()
    for whole in (-10, -9, -8, -7, -6):
        assert min(abs(end - whole) for end in ends) < 1e-6
    assert min(Integers(0, 3).ends()) == pytest.approx(2)
    assert max(Integers(0, 63).ends()) == pytest.approx(63 + 7 / 3)
    assert {-127, 113} <= set(Table(UNEVEN).ends())
