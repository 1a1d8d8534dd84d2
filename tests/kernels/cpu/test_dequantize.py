"""Decoding on the CPU gives the bits of plain PyTorch, for every width of code and group."""

import pytest
import torch
from samples import TABLES, sample

from qtune_kernels.cpu.dequantize import dequantize_into, dequantizes
from qtune_kernels.dequantize import plain_into, stored_weights

pytestmark = pytest.mark.skipif(
    not dequantizes(torch.empty(64)), reason="no kernels for this processor"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 1024])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(7, 64), (5, 192), (16, 100)])
def test_weights_are_those_of_plain_torch(shape, table, group_size, dtype) -> None:
    made = sample(shape, TABLES[table], group_size)
    num_weights = stored_weights(made.packed, made.levels)
    truth, found = (torch.full((num_weights,), torch.nan, dtype=dtype) for _ in range(2))
    plain_into(truth, made.packed, made.scales, made.levels, group_size)
    dequantize_into(found, made.packed, made.scales, made.levels, group_size)
    count = shape[0] * shape[1] // 64 * 64
    assert count and torch.equal(found[:count], truth[:count])


def test_other_dtypes_and_parts_of_segments_are_left_to_plain_torch() -> None:
    assert not dequantizes(torch.empty(64, dtype=torch.float16))
    assert not dequantizes(torch.empty(64, device="meta"))
    assert not dequantizes(torch.empty(100))
