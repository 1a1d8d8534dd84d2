"""The Triton kernels against the plain PyTorch version, bit for bit."""

import pytest
import torch
from samples import COUNTED, NF4, TABLES, VARIANTS, Sample, sample

from qtune_kernels import dequantize as reference

triton_kernels = pytest.importorskip("qtune_kernels.dequantize_triton")

GUARD = 64


def check(made: Sample, dtype: torch.dtype, device: torch.device) -> None:
    """That the kernel writes the bits of the reference, and nothing around them."""
    made = made.to(device)
    num_weights = made.weights.numel()
    out = torch.full((num_weights + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    inner = out[GUARD:-GUARD]
    triton_kernels.dequantize_into(inner, made.packed, made.scales, made.levels, made.group_size)

    stored = reference.stored_weights(made.packed, made.levels)
    truth = torch.empty(stored, dtype=dtype, device=device)
    reference.plain_into(truth, made.packed, made.scales, made.levels, made.group_size)
    assert torch.equal(inner, truth[:num_weights])
    assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all()


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1), 64), ((7, 33), 16), ((41, 200), 32), ((33, 384), 256), ((5, 832), 64)],
)
def test_bits_are_those_of_the_reference(shape, group_size, dtype, levels, device) -> None:
    check(sample(shape, levels, group_size), dtype, device)


@pytest.mark.parametrize("levels", COUNTED.values(), ids=COUNTED.keys())
@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_kinds_of_scales_and_zeros_give_the_bits(variant, group_size, levels, device) -> None:
    check(sample((9, 200), levels, group_size, variant=variant), torch.float32, device)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.zeros != "codes"], ids=str)
def test_bytes_too(variant, device) -> None:
    check(sample((9, 200), (), variant=variant), torch.float32, device)


@pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("group_size", [8, 100, 576, 33, 9 * 200])
def test_groups_may_be_of_any_size(group_size, levels, device) -> None:
    check(sample((9, 200), levels, group_size), torch.bfloat16, device)


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
