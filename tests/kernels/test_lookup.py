import numpy as np
import ptx_model
import pytest
import torch
from samples import NF4

from qtune_kernels.lookup import lookup_ptx

FP4 = (0, 0.005208333, 0.6666667, 1, 1 / 3, 0.5, 1 / 6, 0.25)
TABLES = {
    "nf4": NF4,
    "fp4": FP4 + tuple(-level for level in FP4),
    "integers": tuple(range(-8, 8)),
    "random": tuple(torch.randn(16, generator=torch.Generator().manual_seed(1)).tolist()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_nibbles_become_levels(levels, dtype) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (5000, 4), dtype=np.uint8)
    registers = ptx_model.run(lookup_ptx(levels, dtype), [stored.view(np.uint32)[:, 0]], 4)
    table = torch.tensor(levels, dtype=torch.float32).to(dtype).view(torch.int16).numpy()
    found = np.stack(registers, 1).view(np.int16)
    assert np.array_equal(found[:, :4], table[stored & 15])
    assert np.array_equal(found[:, 4:], table[stored >> 4])


def test_eight_codes_cost_sixteen_permutations() -> None:
    text = lookup_ptx(NF4, torch.bfloat16)
    assert text.count("prmt.b32") == 16
    assert text.count(";") - 1 == 16 + 5
