"""The kernels that quantize rows against plain PyTorch, bit for bit."""

import pytest
import torch
from int8_samples import activations

from qtune_kernels.quantize_rows import quantize_rows

kernels = pytest.importorskip("qtune_kernels.quantize_rows_triton")

THRESHOLDS = pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])
GUARD = 256


@THRESHOLDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 64), (67, 90), (1, 3)])
def test_rows_are_quantized_as_in_plain_pytorch(shape, dtype, threshold, device) -> None:
    x = activations(*shape, dtype=dtype).to(device)
    x[0, 1] = 0.0
    ours, plain = kernels.quantize_rows(x, threshold), quantize_rows(x.cpu(), threshold)
    for mine, other in zip(ours, plain, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.cpu(), other)


def test_rows_longer_than_a_block_are_quantized_block_by_block(device, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "ROW_BLOCK", 64)
    x = activations(3, 200, dtype=torch.float16).to(device)
    for mine, other in zip(kernels.quantize_rows(x, 6.0), quantize_rows(x.cpu(), 6.0), strict=True):
        assert torch.equal(mine.cpu(), other)


def test_rows_of_nothing_and_of_no_numbers(device) -> None:
    x = torch.randn(4, 70, device=device)
    x[1], x[2, 5] = 0.0, torch.nan
    codes, scales, _ = kernels.quantize_rows(x, 6.0)
    assert not codes[1].any() and scales[1] == 0
    assert scales.isnan().tolist() == [False, False, True, False]


def test_quantizing_writes_nothing_beyond_its_buffers(device) -> None:
    x = activations(5, 70, dtype=torch.float16).to(device)
    codes = torch.full((5 * 70 + 2 * GUARD,), 77, dtype=torch.int8, device=device)
    scales = torch.full((5 + 2 * GUARD,), torch.nan, device=device)
    inside = slice(GUARD, -GUARD)
    kernels._quantize_rows_kernel[(5,)](x, None, codes[inside], scales[inside], 70, BLOCK=128)
    assert (codes[:GUARD] == 77).all() and (codes[-GUARD:] == 77).all()
    assert scales[:GUARD].isnan().all() and scales[-GUARD:].isnan().all()
    marks = torch.zeros(70 + 2 * GUARD, dtype=torch.uint8, device=device)
    kernels._find_outliers_kernel[(1, 1)](x, marks[inside], 5, 70, 6.0, ROWS=16, COLUMNS=128)
    assert torch.equal(marks[inside].bool(), (x.abs() > 6).any(0))
    assert not marks[:GUARD].any() and not marks[-GUARD:].any()
