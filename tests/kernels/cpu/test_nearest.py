"""The search among levels in registers, against counting boundaries."""

import pytest
import torch
from stored_samples import LEVELS

from qtune_kernels.cpu.jit import KernelCode, Pointer, available, kernel
from qtune_kernels.cpu.nearest import Nearest, tables
from qtune_kernels.cpu.simd import F32

pytestmark = pytest.mark.skipif(not available(), reason="no kernels for this processor")

# two levels are equal, as in FP4 and in three levels for 2 bits
TABLES = [
    *(levels for levels in LEVELS.values() if levels),
    (0.0, 1.0, -0.0, -1.0),
    (-1.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 1.0, 2.0),
]


@kernel
def _search(
    code: KernelCode, ratios: Pointer, ranks: Pointer, found: Pointer, table: Pointer, *, bits: int
) -> None:
    nearest = Nearest(code, table, bits)
    rank = nearest.rank(code.read(ratios, F32))
    code.store(nearest.code(rank), ranks)
    code.store(nearest.level(rank), found)


@pytest.mark.parametrize("levels", TABLES)
def test_codes_and_levels(levels) -> None:
    values, codes = torch.tensor(levels).sort(stable=True)
    bounds = (values[:-1] + values[1:]) / 2
    beside = [bounds.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    ratios = torch.cat([bounds, *beside, torch.tensor([-torch.inf, torch.inf]), torch.randn(64)])
    bits = len(levels).bit_length() - 1
    for piece in ratios[: len(ratios) // 16 * 16].view(-1, 16):
        found, level = torch.empty(16, dtype=torch.int32), torch.empty(16)
        addresses = (tensor.data_ptr() for tensor in (piece, found, level, tables(levels)))
        _search(*addresses, bits=bits)
        # no ratio is taken to be beyond the last level
        rank = (piece.clamp(max=max(levels))[:, None] > bounds).sum(1)
        assert torch.equal(found.long(), codes[rank]) and torch.equal(level, values[rank])
