"""What becomes of a trained model, as recipes say it."""

import pytest

from qtune.errors import UserError
from qtune.recipe_export import Merge


def test_merges_are_exact_where_they_can_be_and_must_keep_the_tuning():
    assert (Merge().base, Merge().quantized, Merge().method) == ("auto", "auto", "gptq")
    assert Merge().recovery == 0.98


def test_more_than_everything_cannot_be_kept():
    with pytest.raises(UserError, match=r"merge.recovery \(98\) is a share"):
        Merge(recovery=98)
    # a merge that loses more than the whole gain may be wanted too
    assert Merge(recovery=-1).recovery == -1
