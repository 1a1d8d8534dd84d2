import pytest
import torch
from int8_samples import activations

from qtune_kernels.quantize_rows import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THRESHOLDS = pytest.mark.parametrize("threshold", [6.0, 0.0], ids=["outliers", "none"])


@pytest.mark.parametrize("dtype", DTYPES)
@THRESHOLDS
def test_codes_are_the_nearest_integers(threshold: float, dtype: torch.dtype) -> None:
    x = activations(9, 77, dtype=dtype)
    codes, scales, outliers = quantize_rows(x, threshold)
    expected = (x.double().abs() > 6).any(0) if threshold else torch.zeros(77, dtype=torch.bool)
    assert torch.equal(outliers, expected)
    kept = x.double().masked_fill(expected, 0)
    assert torch.equal(scales.double(), kept.abs().amax(1))
    exact = kept / scales.double().unsqueeze(1) * 127
    assert (codes - exact).abs().max() < 0.5 + 1e-4
    assert codes.abs().amax(1).eq(127).all()


def test_rows_of_nothing_have_codes_of_zero() -> None:
    x = torch.zeros(3, 64)
    x[1, 2:] = 1e-40
    x[2, :2] = torch.tensor([7.0, -8.0])
    codes, scales, outliers = quantize_rows(x, 6.0)
    assert not codes.any() and scales.isfinite().all() and outliers.sum() == 2


def test_a_value_at_the_threshold_is_no_outlier() -> None:
    x = torch.tensor([[6.0, -6.0, 6.1, -6.1]])
    assert quantize_rows(x, 6.0)[2].tolist() == [False, False, True, True]


@THRESHOLDS
def test_bitsandbytes_gives_the_same(threshold: float) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = activations(10, 128, dtype=torch.float16)
    # there a small value in a column of outliers may set the scale of its row
    large = x.abs() > 6
    x.masked_fill_(large.any(0) & ~large, 0.0)
    codes, scales, outliers = quantize_rows(x, threshold)
    their_codes, their_scales, their_outliers = functional.int8_vectorwise_quant(
        x.clone(), threshold
    )
    their_columns = torch.empty(0, dtype=torch.long) if their_outliers is None else their_outliers
    assert torch.equal(outliers.nonzero().squeeze(1), their_columns)
    assert torch.equal(scales, their_scales)
    assert torch.equal(codes, their_codes)


def test_the_op_keeps_the_rules_of_torch() -> None:
    torch.library.opcheck(quantize_rows, (activations(3, 70), 6.0))
    torch.library.opcheck(quantize_rows, (torch.empty(0, 70).half(), 0.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@THRESHOLDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (300, 1152), (65, 14336)])
def test_cuda_gives_the_same_bits(shape, dtype, threshold) -> None:
    x = activations(*shape, dtype=dtype)
    pairs = zip(quantize_rows(x.cuda(), threshold), quantize_rows(x, threshold), strict=True)
    assert all(torch.equal(there.cpu(), here) for there, here in pairs)
