"""The Triton kernels against the plain PyTorch version, bit for bit."""

import pytest
import torch
from samples import NF4, TABLES, sample

from qtune_kernels import dequantize as reference

triton_kernels = pytest.importorskip("qtune_kernels.dequantize_triton")

GUARD = 64


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1), 64), ((7, 33), 16), ((41, 200), 32), ((33, 384), 256), ((5, 832), 64)],
)
def test_bits_are_those_of_the_reference(shape, group_size, dtype, levels, device) -> None:
    made = sample(shape, levels, group_size).to(device)
    num_weights = shape[0] * shape[1]
    out = torch.full((num_weights + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    inner = out[GUARD:-GUARD]
    triton_kernels.dequantize_into(inner, made.packed, made.scales, levels, group_size)

    stored = reference.stored_weights(made.packed, levels)
    truth = torch.empty(stored, dtype=dtype, device=device)
    reference.plain_into(truth, made.packed, made.scales, levels, group_size)
    assert torch.equal(inner, truth[:num_weights])
    assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all()


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
def test_more_than_one_program_writes(levels, device) -> None:
    made = sample((3, triton_kernels.PROGRAM_WEIGHTS // 2 + 1), levels).to(device)
    out = torch.full((made.weights.numel(),), torch.nan, device=device)
    triton_kernels.dequantize_into(out, made.packed, made.scales, levels, 64)
    torch.testing.assert_close(out.double(), made.weights.view(-1), rtol=2e-7, atol=0)


def test_levels_are_made_once(device) -> None:
    table = triton_kernels.levels_table(NF4, device)
    assert table.tolist() == list(NF4)
    assert triton_kernels.levels_table(NF4, device) is table
