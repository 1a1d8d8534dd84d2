"""Tall matrices lying down: every element in its place, zeros behind the last."""

import pytest
import torch

from qtune_kernels.cpu import tiles
from qtune_kernels.cpu.transpose import lying

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no AMX")


@pytest.mark.parametrize("rank", [1, 16, 31, 32, 33, 96, 107])
@pytest.mark.parametrize("num_rows", [32, 160])
def test_rows_become_columns(num_rows, rank) -> None:
    around = torch.full((num_rows, rank + 5), torch.nan, dtype=torch.bfloat16)
    tall = around[:, :rank].copy_(torch.randn(num_rows, rank))
    found = lying(tall)
    assert found.shape == (-(-rank // 32) * 32, num_rows) and found.is_contiguous()
    assert torch.equal(found[:rank], tall.T)
    assert not found[rank:].any()
