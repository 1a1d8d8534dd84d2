"""Decoding at any place of a matrix: the weights that plain PyTorch gives there."""

import pytest
import torch
from samples import TABLES, sample

from qtune_kernels.cpu.decode import Packed
from qtune_kernels.cpu.jit import Integer, KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.product import level_table
from qtune_kernels.dequantize import plain_into, stored_weights
from qtune_kernels.packing import code_bits
from qtune_kernels.scales import dynamic_map

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")


@kernel
def _at(
    code: KernelCode,
    weights: Pointer,
    at: Integer,
    packed: Pointer,
    scale_codes: Pointer,
    scale_scales: Pointer,
    scale_offset: Pointer,
    scale_map: Pointer,
    levels: Pointer,
    *,
    bits: int,
    group_size: int,
    count: int,
) -> None:
    scales = (scale_codes, scale_scales, scale_offset, scale_map)
    matrix = Packed(code, packed, *scales, levels, bits=bits, group_size=group_size)
    for part, weight in enumerate(matrix.weights(at, count)):
        code.store(weight, weights + 64 * part)


@pytest.mark.parametrize("group_size", [16, 64, 512])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("table", TABLES)
def test_weights_from_any_place_on(table, count, group_size) -> None:
    made = sample((32, 64), TABLES[table], group_size)
    truth = torch.empty(stored_weights(made.packed, made.levels))
    plain_into(truth, made.packed, made.scales, made.levels, group_size)
    tables = (*made.scales, dynamic_map(truth.device), level_table(made.levels))
    addresses = [tensor.data_ptr() for tensor in (made.packed, *tables)]
    for at in range(0, 2048, 16 * count):
        found = torch.empty(16 * count)
        fixed = {"bits": code_bits(made.levels), "group_size": group_size, "count": count}
        _at(found.data_ptr(), at, *addresses, **fixed)
        assert torch.equal(found, truth[at : at + 16 * count])
